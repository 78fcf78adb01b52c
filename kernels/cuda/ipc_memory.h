// Memory of other processes' GPUs (CUDA IPC): opened once, shared by all that import it, closed
// with the last of them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/devices.h"
#include "kernels/imported_memory.h"

namespace structkv::cuda {

// Thread-safe. What was imported keeps the object alive.
class IpcImports : public std::enable_shared_from_this<IpcImports> {
 public:
  // For the memory of these devices, which are not used afterwards.
  explicit IpcImports(const Devices& devices);

  // As Backend::Import. Where the exporter is this process nothing is opened (CUDA refuses to): its
  // own addresses are used. FAILED_PRECONDITION also where an older allocation of that exporter at
  // that address is still open.
  absl::StatusOr<std::unique_ptr<ImportedMemory>> Import(const ExportedMemory& exported);

  // Allocations of other processes that are open.
  int64_t open() const;

 private:
  struct Gpu {
    int index = 0;
    std::string uuid;
    std::string name;
  };
  // One of another process.
  struct Opened {
    std::string handle;
    int gpu = 0;
    std::byte* data = nullptr;
    int64_t bytes = 0;  // all of the allocation
    int64_t users = 0;
  };
  using Key = std::pair<std::string, uint64_t>;  // exporter and base
  class Imported;

  absl::StatusOr<const Gpu*> Find(const std::string& uuid) const;
  // One user more. Closed again by Close.
  absl::StatusOr<std::byte*> Open(const ExportedMemory& exported, const Gpu& gpu);
  void Close(const Key& key);

  std::vector<Gpu> gpus_;
  mutable std::mutex mutex_;
  std::map<Key, Opened> opened_;
};

}  // namespace structkv::cuda
