// A registration that lives by a lease.
#pragma once

#include <memory>
#include <string>

#include "absl/time/time.h"
#include "client/cpp/registration.h"

namespace structkv::client::internal {

// The lease that is asked for of memory of a GPU.
inline absl::Duration LeaseOf(const RegionOptions& options) {
  return options.lease > absl::ZeroDuration() ? options.lease : absl::Seconds(30);
}

struct LeasedRegion {
  RegionServer server;
  std::string handle;  // empty: it is not known whether the server has it
  absl::Duration lease;
  // What the server has open, kept until it has closed it; null: it may go at any time.
  std::shared_ptr<const void> memory;
  // How long beyond the lease's end the server may have it open unasked.
  absl::Duration quarantine;
};

// Renews the lease on a thread, three times in each. Unregisters at the end; memory that the server
// has open then is kept on a thread that asks for it.
std::unique_ptr<Registration> KeepLease(LeasedRegion region);

// Keeps the memory, on a thread, until the server has closed it or must have: the lease begins no
// later than now.
void Quarantine(LeasedRegion region);

}  // namespace structkv::client::internal
