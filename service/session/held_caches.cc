#include "service/session/held_caches.h"

#include "absl/strings/str_cat.h"
#include "service/session/limit.h"
#include "service/transport/handle.h"

namespace structkv::session {

HeldCaches::HeldCaches(const HoldOptions& options, std::shared_ptr<const Clock> clock)
    : options_(options),
      clock_(clock != nullptr ? std::move(clock) : std::make_shared<SteadyClock>()),
      budget_(options.budget_bytes) {}

absl::Status HeldCaches::CheckEnabled() const {
  if (budget_.limit_bytes() > 0) return absl::OkStatus();
  return absl::UnimplementedError("this server holds no caches: its --hold-budget is 0");
}

absl::StatusOr<absl::Duration> HeldCaches::Lease(std::optional<uint64_t> millis,
                                                 absl::string_view field) const {
  const HoldOptions options = options_.Get();
  if (!millis.has_value()) return options.default_lease;
  const auto most = static_cast<uint64_t>(absl::ToInt64Milliseconds(options.max_lease));
  if (*millis < 1 || *millis > most) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, " is ", *millis, "; 1 to ", most, " are allowed"));
  }
  return absl::Milliseconds(static_cast<int64_t>(*millis));
}

void HeldCaches::SetLeases(absl::Duration default_lease, absl::Duration max_lease) {
  HoldOptions options = options_.Get();
  options.default_lease = default_lease;
  options.max_lease = max_lease;
  options_.Set(options);
}

absl::StatusOr<Reservation> HeldCaches::Reserve(int64_t bytes) {
  while (true) {
    absl::StatusOr<Reservation> reservation = budget_.Reserve(bytes);
    if (reservation.ok()) return reservation;
    const bool never = reservation.status().GetPayload(kNeverFits).has_value();
    if (!never && TakeExpired() != nullptr) continue;
    absl::Status refused(reservation.status().code(), absl::StrCat("held caches (--hold-budget): ",
                                                                   reservation.status().message()));
    if (never) refused.SetPayload(kNeverFits, absl::Cord());
    return MarkLimit(refused, kHoldBudgetLimit);
  }
}

std::string HeldCaches::Publish(std::shared_ptr<const HeldCache> cache, std::string tenant,
                                absl::Duration lease) {
  Entry entry = {std::move(cache), std::move(tenant), lease, ExpiryOf(lease)};
  std::string handle = transport::NewHandle();
  const std::lock_guard lock(mutex_);
  by_expiry_.emplace(entry.expires, handle);
  entries_.emplace(handle, std::move(entry));
  return handle;
}

absl::StatusOr<HeldCaches::Entries::const_iterator> HeldCaches::FindLocked(
    absl::string_view handle, absl::string_view tenant) const {
  if (absl::Status enabled = CheckEnabled(); !enabled.ok()) return enabled;
  if (handle.size() != transport::kHandleBytes) {
    return absl::InvalidArgumentError(absl::StrCat("handle is ", handle.size(), " bytes long; ",
                                                   transport::kHandleBytes, " are needed"));
  }
  const auto found = entries_.find(handle);
  if (found == entries_.end() || found->second.tenant != tenant ||
      found->second.expires <= clock_->Now()) {
    return absl::NotFoundError(
        "handle: no such cache is held; it was released, its lease has run out, or it never was");
  }
  return found;
}

absl::StatusOr<std::shared_ptr<const HeldCache>> HeldCaches::Find(absl::string_view handle,
                                                                  absl::string_view tenant) const {
  const std::lock_guard lock(mutex_);
  const auto found = FindLocked(handle, tenant);
  if (!found.ok()) return found.status();
  return (*found)->second.cache;
}

absl::StatusOr<absl::Duration> HeldCaches::Renew(absl::string_view handle, absl::string_view tenant,
                                                 std::optional<uint64_t> millis) {
  const absl::StatusOr<absl::Duration> wanted = Lease(millis, "lease_millis");
  const std::lock_guard lock(mutex_);
  const auto found = FindLocked(handle, tenant);
  if (!found.ok()) return found.status();
  if (!wanted.ok()) return wanted.status();
  Entry& entry = entries_.find((*found)->first)->second;
  by_expiry_.erase({entry.expires, std::string(handle)});
  if (millis.has_value()) entry.lease = *wanted;
  entry.expires = ExpiryOf(entry.lease);
  by_expiry_.emplace(entry.expires, handle);
  return entry.lease;
}

absl::Status HeldCaches::Release(absl::string_view handle, absl::string_view tenant) {
  std::shared_ptr<const HeldCache> cache;  // goes outside of the lock
  const std::lock_guard lock(mutex_);
  const auto found = FindLocked(handle, tenant);
  if (!found.ok()) return found.status();
  cache = (*found)->second.cache;
  by_expiry_.erase({(*found)->second.expires, std::string(handle)});
  entries_.erase(*found);
  return absl::OkStatus();
}

void HeldCaches::DropExpired() {
  while (TakeExpired() != nullptr) {
  }
}

std::shared_ptr<const HeldCache> HeldCaches::TakeExpired() {
  const std::lock_guard lock(mutex_);
  if (by_expiry_.empty() || by_expiry_.begin()->first > clock_->Now()) return nullptr;
  const auto entry = entries_.find(by_expiry_.begin()->second);
  std::shared_ptr<const HeldCache> cache = std::move(entry->second.cache);
  entries_.erase(entry);
  by_expiry_.erase(by_expiry_.begin());
  ++expired_;
  return cache;
}

Clock::Time HeldCaches::ExpiryOf(absl::Duration lease) const {
  return clock_->Now() + absl::ToChronoNanoseconds(lease);
}

int64_t HeldCaches::expired() const {
  const std::lock_guard lock(mutex_);
  return expired_;
}

int64_t HeldCaches::count() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int64_t>(entries_.size());
}

}  // namespace structkv::session
