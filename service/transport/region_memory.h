// What a region consists of: a mapped file, or memory of a GPU.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/status/status.h"

namespace structkv::transport {

// Held as long as the object lives. Thread-safe.
class RegionMemory {
 public:
  virtual ~RegionMemory() = default;

  virtual std::byte* data() const = 0;
  virtual int64_t size() const = 0;
  virtual bool writable() const = 0;
  // The GPU in whose memory it lies, by CUDA's number: the host cannot touch it. nullopt: the
  // host's.
  virtual std::optional<int> gpu() const { return std::nullopt; }

  // Waits until what the client wrote before it named it can be read; DEADLINE_EXCEEDED where that
  // is not before `end`.
  virtual absl::Status Await(std::chrono::steady_clock::time_point /*end*/) const {
    return absl::OkStatus();
  }
  // FAILED_PRECONDITION, with the sizes then and now, where bytes are gone. Ask after each use:
  // what was read before may be zeros.
  virtual absl::Status Check() const = 0;
};

}  // namespace structkv::transport
