// How much of the server one tenant may have at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"

namespace structkv::session {

// Of each tenant; 0: no limit but the server's own.
struct TenantLimits {
  int64_t max_sessions = 0;
  int64_t memory_bytes = 0;  // of the memory budget
  int64_t hold_bytes = 0;    // of the budget of held caches
};

// Thread-safe. Counts; allocates nothing.
class TenantShares {
 public:
  struct Amounts {
    int64_t sessions = 0;
    int64_t memory_bytes = 0;
    int64_t hold_bytes = 0;
  };
  // What a tenant has taken; its end gives it back. May outlive the object that it is of.
  using Share = std::shared_ptr<const void>;

  explicit TenantShares(const TenantLimits& limits);

  // RESOURCE_EXHAUSTED, with what is wanted, taken and allowed, where it does not fit; with the
  // payload kNeverFits (memory_budget.h) where it never will.
  absl::StatusOr<Share> Take(const std::string& tenant, const Amounts& amounts);

  // Applies to what is taken from now on; what is taken stays.
  void SetLimits(const TenantLimits& limits);
  TenantLimits limits() const;

  // Tenants that have anything.
  int64_t tenants() const;

 private:
  struct State {
    mutable std::mutex mutex;
    absl::flat_hash_map<std::string, Amounts> taken;
  };

  TenantLimits limits_;  // under the state's mutex
  const std::shared_ptr<State> state_ = std::make_shared<State>();
};

}  // namespace structkv::session
