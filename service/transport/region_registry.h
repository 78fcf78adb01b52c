// The regions that clients have registered: whose they are, how long they live, who uses them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "service/clock.h"
#include "service/transport/file_descriptor.h"
#include "service/transport/handle.h"
#include "service/transport/region_files.h"
#include "service/transport/region_memory.h"

namespace structkv::transport {

struct RegionOptions {
  // Bytes of all regions together that may be mapped at once: addresses, and pages that a client
  // has not touched, are the server's.
  int64_t max_bytes = int64_t{64} << 30;
  int64_t max_regions = 4096;
  // Of regions that name none, and the longest that may be asked for.
  absl::Duration lease = absl::Seconds(30);
  absl::Duration max_lease = absl::Minutes(10);
  // Where names lie.
  std::string directory = kRegionDirectory;
  std::shared_ptr<const Clock> clock = std::make_shared<SteadyClock>();  // of leases; not null
};

inline constexpr absl::Duration kMinLease = absl::Milliseconds(100);

// What a client asked for; what no duration holds is infinite, and refused as too long.
absl::Duration LeaseOf(uint64_t millis);

struct NewRegion {
  uint64_t size_bytes = 0;
  bool writable = false;
  std::optional<absl::Duration> lease;
  std::string tenant;
  // For people; of a name, and of a GPU's memory, it is made from what that is.
  std::string owner;
  // The connection whose end is the region's; 0: none.
  int64_t connection = 0;
};

struct RegisteredRegion {
  std::string handle;                   // kHandleBytes
  std::optional<absl::Duration> lease;  // in force
};

struct RegionInfo {
  int64_t size_bytes = 0;
  bool writable = false;
  bool unregistering = false;
  bool broken = false;
  std::optional<absl::Duration> lease_left;
  int64_t uses = 0;
  std::string owner;
};

// A prompt's use of a region, which stays mapped as long. Thread-safe; may outlive the registry.
class RegionUse {
 public:
  ~RegionUse();
  RegionUse(const RegionUse&) = delete;
  RegionUse& operator=(const RegionUse&) = delete;

  const RegionMemory& memory() const;

 private:
  friend class RegionRegistry;
  struct Parts;
  explicit RegionUse(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

// Thread-safe. A handle that is unknown, and one of another tenant, are the same NOT_FOUND.
class RegionRegistry {
 public:
  explicit RegionRegistry(RegionOptions options);
  ~RegionRegistry();

  // Maps a file and gives it a handle. INVALID_ARGUMENT for sizes and leases out of range, and
  // descriptors that CheckDescriptor refuses; RESOURCE_EXHAUSTED beyond the limits.
  absl::StatusOr<RegisteredRegion> AddDescriptor(FileDescriptor file, const NewRegion& wanted);
  // Likewise of memory that is not a file's, and lives by a lease. `open` is called once what is
  // wanted is within its limits, and gives memory of that size; also what it returns.
  using OpenMemory = absl::FunctionRef<absl::StatusOr<std::unique_ptr<RegionMemory>>()>;
  absl::StatusOr<RegisteredRegion> AddMemory(OpenMemory open, const NewRegion& wanted);
  // Likewise of a name, which is gone afterwards; also what OpenNamed and RemoveName return.
  absl::StatusOr<RegisteredRegion> AddName(const std::string& name, const NewRegion& wanted);

  // NOT_FOUND only once the region is unmapped.
  absl::StatusOr<RegionInfo> Get(const std::string& handle, const std::string& tenant) const;
  // The lease in force, from now; none: the region had none, and none was asked for. NOT_FOUND also
  // once the region is unregistered.
  absl::StatusOr<std::optional<absl::Duration>> Renew(const std::string& handle,
                                                      const std::string& tenant,
                                                      std::optional<absl::Duration> lease);
  // Returns the uses that are left; the last one's end unmaps the region. 0: it is unmapped; being
  // unmapped counts as a use.
  absl::StatusOr<int64_t> Unregister(const std::string& handle, const std::string& tenant);
  // NOT_FOUND also once the region is unregistered; FAILED_PRECONDITION where it is broken.
  absl::StatusOr<std::shared_ptr<const RegionUse>> Use(const std::string& handle,
                                                       const std::string& tenant);

  // Unregisters all of a connection.
  void EndConnection(int64_t connection);
  // Unregisters what no lease keeps any more. To be called often enough.
  void Expire();

  // Regions of a connection that are not unregistered.
  int64_t RegionsOf(int64_t connection) const;

  int64_t mapped_bytes() const;
  int64_t regions() const;
  // Regions whose lease ran out, since the start.
  int64_t expired() const;
  const RegionOptions& options() const;

 private:
  friend class RegionUse;
  struct Region;
  class State;
  std::shared_ptr<State> state_;
};

}  // namespace structkv::transport
