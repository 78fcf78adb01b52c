// The caches that a server holds, by handle: leases, their budget, and who may have them.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "service/clock.h"
#include "service/live.h"
#include "service/session/held_cache.h"
#include "service/session/memory_budget.h"

namespace structkv::session {

struct HoldOptions {
  int64_t budget_bytes = 0;  // for all held caches together; 0: none is held
  absl::Duration default_lease = absl::Seconds(60);
  absl::Duration max_lease = absl::Minutes(10);
};

// Thread-safe. Caches that were found may outlive it, and their expiry and release: their memory
// comes back with the last share.
class HeldCaches {
 public:
  // `clock` null: a steady one.
  explicit HeldCaches(const HoldOptions& options, std::shared_ptr<const Clock> clock = nullptr);

  // UNIMPLEMENTED where nothing is held.
  absl::Status CheckEnabled() const;

  // A lease of so many milliseconds, or the default. INVALID_ARGUMENT, naming `field`, out of 1 to
  // the maximum.
  absl::StatusOr<absl::Duration> Lease(std::optional<uint64_t> millis,
                                       absl::string_view field) const;

  // Memory for a cache. Where there is not enough, expired caches go first, the oldest expired one
  // before the others; one that is being read keeps its memory. As MemoryBudget::Reserve.
  absl::StatusOr<Reservation> Reserve(int64_t bytes);

  // Lets `tenant` find the cache, for `lease` from now on. The handle.
  std::string Publish(std::shared_ptr<const HeldCache> cache, std::string tenant,
                      absl::Duration lease);

  // The following are NOT_FOUND, in the same words, where the handle is unknown, released, expired
  // or another tenant's; INVALID_ARGUMENT where it is not transport::kHandleBytes long.

  // Whoever reads the cache keeps the share. Leaves the lease as it is.
  absl::StatusOr<std::shared_ptr<const HeldCache>> Find(absl::string_view handle,
                                                        absl::string_view tenant) const;
  // Begins the lease anew, of `millis` or as long as before, and returns it.
  absl::StatusOr<absl::Duration> Renew(absl::string_view handle, absl::string_view tenant,
                                       std::optional<uint64_t> millis);
  absl::Status Release(absl::string_view handle, absl::string_view tenant);

  // Drops what has expired.
  void DropExpired();

  HoldOptions options() const { return options_.Get(); }
  // For leases that begin from now on.
  void SetLeases(absl::Duration default_lease, absl::Duration max_lease);
  const MemoryBudget& budget() const { return budget_; }
  // Caches that have not been dropped.
  int64_t count() const;
  // Those whose lease ran out, since the start.
  int64_t expired() const;

 private:
  struct Entry {
    std::shared_ptr<const HeldCache> cache;
    std::string tenant;
    absl::Duration lease;
    Clock::Time expires;
  };
  using Entries = absl::flat_hash_map<std::string, Entry>;

  absl::StatusOr<Entries::const_iterator> FindLocked(absl::string_view handle,
                                                     absl::string_view tenant) const;
  // Takes out the cache that expired first; null where none has expired.
  std::shared_ptr<const HeldCache> TakeExpired();
  Clock::Time ExpiryOf(absl::Duration lease) const;

  Live<HoldOptions> options_;
  const std::shared_ptr<const Clock> clock_;
  MemoryBudget budget_;
  mutable std::mutex mutex_;
  Entries entries_;                                          // by handle
  std::set<std::pair<Clock::Time, std::string>> by_expiry_;  // handles
  int64_t expired_ = 0;
};

}  // namespace structkv::session
