#include "service/session/memory_budget.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace structkv::session {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(MemoryBudgetTest, CountsWhatIsReserved) {
  MemoryBudget budget(100);
  EXPECT_EQ(budget.limit_bytes(), 100);
  {
    const absl::StatusOr<Reservation> a = budget.Reserve(60);
    ASSERT_TRUE(a.ok());
    EXPECT_EQ(a->bytes(), 60);
    const absl::StatusOr<Reservation> b = budget.Reserve(40);  // to the last byte
    ASSERT_TRUE(b.ok());
    const absl::StatusOr<Reservation> nothing = budget.Reserve(0);
    EXPECT_TRUE(nothing.ok());
    EXPECT_EQ(budget.reserved_bytes(), 100);
  }
  EXPECT_EQ(budget.reserved_bytes(), 0);
}

TEST(MemoryBudgetTest, WhatOthersHoldIsToBeHadLater) {
  MemoryBudget budget(100);
  absl::StatusOr<Reservation> other = budget.Reserve(60);
  const absl::Status status = budget.Reserve(41).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(status.GetPayload(kNeverFits).has_value());
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("41 bytes"), HasSubstr("60 of"), HasSubstr("100")));
  EXPECT_EQ(budget.reserved_bytes(), 60);
  other->Release();
  EXPECT_TRUE(budget.Reserve(41).ok());
}

TEST(MemoryBudgetTest, WhatNeverFitsIsToldApart) {
  MemoryBudget budget(100);
  for (const int64_t bytes : {int64_t{101}, std::numeric_limits<int64_t>::max(), int64_t{-1}}) {
    const absl::Status status = budget.Reserve(bytes).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_TRUE(status.GetPayload(kNeverFits).has_value());
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr(std::to_string(bytes)), HasSubstr("100")));
  }
  EXPECT_EQ(budget.reserved_bytes(), 0);
}

TEST(MemoryBudgetTest, ANegativeLimitIsNone) {
  MemoryBudget budget(-5);
  EXPECT_EQ(budget.limit_bytes(), 0);
  EXPECT_TRUE(budget.Reserve(0).ok());
  EXPECT_FALSE(budget.Reserve(1).ok());
}

TEST(ReservationTest, MovesAndReleasesOnce) {
  MemoryBudget budget(100);
  Reservation a = *budget.Reserve(10);
  Reservation b = *budget.Reserve(20);
  Reservation& self = a;
  a = std::move(self);
  EXPECT_EQ(budget.reserved_bytes(), 30);
  a = std::move(b);  // gives back what a had
  EXPECT_EQ(budget.reserved_bytes(), 20);
  EXPECT_EQ(b.bytes(), 0);  // NOLINT(bugprone-use-after-move): that is what is tested
  b.Release();
  Reservation c(std::move(a));
  EXPECT_EQ(c.bytes(), 20);
  EXPECT_EQ(budget.reserved_bytes(), 20);
  c.Release();
  c.Release();
  EXPECT_EQ(c.bytes(), 0);
  EXPECT_EQ(budget.reserved_bytes(), 0);
}

TEST(ReservationTest, OutlivesItsBudget) {
  std::optional<MemoryBudget> budget(100);
  Reservation reservation = *budget->Reserve(10);
  budget.reset();
  EXPECT_EQ(reservation.bytes(), 10);
  reservation.Release();
}

TEST(MemoryBudgetTest, ThreadsNeverGetMoreThanThereIs) {
  MemoryBudget budget(100);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&budget, t] {
      for (int i = 0; i < 2000; ++i) {
        const absl::StatusOr<Reservation> reservation = budget.Reserve(20 + (t + i) % 30);
        EXPECT_LE(budget.reserved_bytes(), 100);
        if (reservation.ok()) {
          EXPECT_GE(budget.reserved_bytes(), reservation->bytes());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(budget.reserved_bytes(), 0);
}

}  // namespace
}  // namespace structkv::session
