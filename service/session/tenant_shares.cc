#include "service/session/tenant_shares.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "service/session/limit.h"
#include "service/session/memory_budget.h"

namespace structkv::session {
namespace {

absl::Status Check(const char* what, const char* option, absl::string_view name, int64_t wanted,
                   int64_t taken, int64_t limit) {
  if (limit == 0 || wanted <= limit - taken) return absl::OkStatus();
  absl::Status status = absl::ResourceExhaustedError(
      absl::StrCat("the tenant has ", taken, " ", what, " and asks for ", wanted, "; at most ",
                   limit, " are allowed (--", option, ")"));
  if (wanted > limit) status.SetPayload(kNeverFits, absl::Cord());
  return MarkLimit(status, name);
}

}  // namespace

TenantShares::TenantShares(const TenantLimits& limits) : limits_(limits) {}

absl::StatusOr<TenantShares::Share> TenantShares::Take(const std::string& tenant,
                                                       const Amounts& amounts) {
  const std::lock_guard lock(state_->mutex);
  const auto found = state_->taken.find(tenant);
  const Amounts taken = found == state_->taken.end() ? Amounts{} : found->second;
  absl::Status status = Check("prompts", "tenant-max-sessions", kTenantMaxSessionsLimit,
                              amounts.sessions, taken.sessions, limits_.max_sessions);
  status.Update(Check("bytes of memory", "tenant-memory", kTenantMemoryLimit, amounts.memory_bytes,
                      taken.memory_bytes, limits_.memory_bytes));
  status.Update(Check("bytes of held caches", "tenant-hold-budget", kTenantHoldBudgetLimit,
                      amounts.hold_bytes, taken.hold_bytes, limits_.hold_bytes));
  if (!status.ok()) return status;
  Amounts& all = state_->taken[tenant];
  all.sessions += amounts.sessions;
  all.memory_bytes += amounts.memory_bytes;
  all.hold_bytes += amounts.hold_bytes;
  return Share(nullptr, [state = state_, tenant, amounts](const void*) {
    const std::lock_guard give_back(state->mutex);
    const auto entry = state->taken.find(tenant);
    Amounts& left = entry->second;
    left.sessions -= amounts.sessions;
    left.memory_bytes -= amounts.memory_bytes;
    left.hold_bytes -= amounts.hold_bytes;
    if (left.sessions == 0 && left.memory_bytes == 0 && left.hold_bytes == 0) {
      state->taken.erase(entry);
    }
  });
}

void TenantShares::SetLimits(const TenantLimits& limits) {
  const std::lock_guard lock(state_->mutex);
  limits_ = limits;
}

TenantLimits TenantShares::limits() const {
  const std::lock_guard lock(state_->mutex);
  return limits_;
}

int64_t TenantShares::tenants() const {
  const std::lock_guard lock(state_->mutex);
  return static_cast<int64_t>(state_->taken.size());
}

}  // namespace structkv::session
