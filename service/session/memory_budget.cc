#include "service/session/memory_budget.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace structkv::session {

// Shared with the reservations, which may outlive the budget.
struct BudgetState {
  explicit BudgetState(int64_t limit) : limit_bytes(limit) {}

  const int64_t limit_bytes;
  std::mutex mutex;
  int64_t reserved_bytes = 0;
};

Reservation::Reservation(Reservation&& other) noexcept
    : state_(std::move(other.state_)),
      bytes_(std::exchange(other.bytes_, 0)),
      also_(std::move(other.also_)) {}

Reservation& Reservation::operator=(Reservation&& other) noexcept {
  if (this == &other) return *this;
  Release();
  state_ = std::move(other.state_);
  bytes_ = std::exchange(other.bytes_, 0);
  also_ = std::move(other.also_);
  return *this;
}

void Reservation::Release() {
  if (state_ != nullptr) {
    const std::lock_guard lock(state_->mutex);
    state_->reserved_bytes -= bytes_;
  }
  state_.reset();
  bytes_ = 0;
  also_.reset();
}

MemoryBudget::MemoryBudget(int64_t limit_bytes)
    : state_(std::make_shared<BudgetState>(std::max<int64_t>(limit_bytes, 0))) {}

absl::StatusOr<Reservation> MemoryBudget::Reserve(int64_t bytes) {
  if (bytes < 0 || bytes > state_->limit_bytes) {
    absl::Status status = absl::ResourceExhaustedError(absl::StrCat(
        "the prompt needs ", bytes, " bytes of memory; the whole budget is ", state_->limit_bytes));
    status.SetPayload(kNeverFits, absl::Cord());
    return status;
  }
  const std::lock_guard lock(state_->mutex);
  if (bytes > state_->limit_bytes - state_->reserved_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the prompt needs ", bytes, " bytes of memory; ", state_->reserved_bytes,
                     " of the budget of ", state_->limit_bytes, " are reserved by others"));
  }
  state_->reserved_bytes += bytes;
  Reservation reservation;
  reservation.state_ = state_;
  reservation.bytes_ = bytes;
  return reservation;
}

int64_t MemoryBudget::limit_bytes() const { return state_->limit_bytes; }

int64_t MemoryBudget::reserved_bytes() const {
  const std::lock_guard lock(state_->mutex);
  return state_->reserved_bytes;
}

}  // namespace structkv::session
