// Memory of a file that another process has as well.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/transport/bus_guard.h"
#include "service/transport/file_descriptor.h"
#include "service/transport/region_memory.h"

namespace structkv::transport {

// The first bytes of a file, mapped shared, and watched by a BusGuard: where the other side takes
// them away they read as zeros, and Check() says so. Thread-safe.
class Mapping final : public RegionMemory {
 public:
  // Keeps `file` open, so that Check() can see it shrink; a file that cannot (`sealed`) is closed.
  // RESOURCE_EXHAUSTED where there is no room for it in the process, PERMISSION_DENIED where the
  // file may not be mapped so.
  static absl::StatusOr<std::unique_ptr<Mapping>> Map(FileDescriptor file, int64_t size,
                                                      bool writable, bool sealed);
  ~Mapping() override;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::byte* data() const override { return data_; }
  int64_t size() const override { return size_; }
  bool writable() const override { return writable_; }
  // An access met bytes that are gone, or the file is shorter now.
  absl::Status Check() const override;

 private:
  Mapping() = default;

  FileDescriptor file_;  // of a file that can shrink
  std::byte* data_ = nullptr;
  int64_t size_ = 0;
  bool writable_ = false;
  std::optional<BusGuard> guard_;
};

}  // namespace structkv::transport
