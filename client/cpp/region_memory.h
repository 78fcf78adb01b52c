// What a region consists of: a mapped file, or memory of a GPU.
#pragma once

#include <cstddef>
#include <memory>

#include "absl/status/statusor.h"
#include "client/cpp/registration.h"
#include "structkv/region.h"

namespace structkv::client::internal {

// Held as long as the object lives. Thread-safe.
class RegionMemory {
 public:
  virtual ~RegionMemory() = default;

  virtual std::byte* data() const = 0;
  // Null: memory of the host.
  virtual const GpuMemory* gpu() const { return nullptr; }

  // Has the server know it. Errors: Client::Register().
  virtual absl::StatusOr<std::unique_ptr<Registration>> Register(const RegionServer& server,
                                                                 const RegionOptions& options,
                                                                 absl::Time deadline) = 0;
};

// Memory of the host, of the kind that `options` say; they get the size that it has.
absl::StatusOr<std::shared_ptr<RegionMemory>> MakeHostMemory(RegionOptions* options);

}  // namespace structkv::client::internal
