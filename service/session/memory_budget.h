// The memory that all sessions share, handed out as reservations.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"

namespace structkv::session {

class MemoryBudget;

// Reserved bytes, given back when destroyed. Move-only.
class Reservation {
 public:
  Reservation() = default;
  Reservation(Reservation&& other) noexcept;
  Reservation& operator=(Reservation&& other) noexcept;
  ~Reservation() { Release(); }
  int64_t bytes() const { return bytes_; }
  // `also` goes when the bytes are given back.
  void Keep(std::shared_ptr<const void> also) { also_ = std::move(also); }
  void Release();

 private:
  friend class MemoryBudget;
  std::shared_ptr<struct BudgetState> state_;
  int64_t bytes_ = 0;
  std::shared_ptr<const void> also_;
};

// Type URL of a payload: what was refused for lack of memory is larger than the whole budget.
inline constexpr char kNeverFits[] = "structkv/never-fits";

// Thread-safe. Counts bytes; allocates nothing.
class MemoryBudget {
 public:
  explicit MemoryBudget(int64_t limit_bytes);

  // RESOURCE_EXHAUSTED, with the bytes asked for, reserved and allowed, where they do not fit now.
  // Where they exceed the whole budget, and so never will, the status has kNeverFits as a payload.
  absl::StatusOr<Reservation> Reserve(int64_t bytes);

  int64_t limit_bytes() const;
  int64_t reserved_bytes() const;

 private:
  std::shared_ptr<struct BudgetState> state_;
};

}  // namespace structkv::session
