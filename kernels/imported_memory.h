// Memory of a GPU that another process allocated, for a backend to compute on.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace structkv {

inline constexpr size_t kIpcHandleBytes = 64;  // of CUDA's, of memory and of events
inline constexpr size_t kDeviceUuidBytes = 16;
inline constexpr size_t kProcessIdBytes = 16;

// One whole allocation as the process that made it describes it.
struct ExportedMemory {
  std::string memory_handle;  // kIpcHandleBytes
  int64_t bytes = 0;          // of the allocation, or of its first part; 1 or more
  std::string device_uuid;    // kDeviceUuidBytes, of the GPU that it lies on
  std::string exporter;       // kProcessIdBytes, ProcessId() of that process
  // Addresses in that process, of the allocation's begin and of the event. Used as such only where
  // it is this process; otherwise the first tells one of its allocations from another.
  uint64_t base_address = 0;
  uint64_t event_address = 0;
  // kIpcHandleBytes, of the event that is recorded behind what writes the memory; empty: none.
  std::string event_handle;
};

// Such memory, open in this process as long as the object lives. Thread-safe.
class ImportedMemory {
 public:
  virtual ~ImportedMemory() = default;

  // The first of ExportedMemory::bytes bytes; a device's address.
  virtual std::byte* data() const = 0;
  // Of the GPU, CUDA's.
  virtual int gpu() const = 0;
  // Waits until the event's last record, as of now, was reached: what the exporter wrote before it
  // may be read then. DEADLINE_EXCEEDED where that is not before `end`, UNAVAILABLE where
  // the GPU is lost.
  virtual absl::Status Await(std::chrono::steady_clock::time_point end) const = 0;
};

// Unlike that of any other process, and not to be guessed: who names it as the exporter is trusted
// with addresses. kProcessIdBytes.
std::string ProcessId();

}  // namespace structkv
