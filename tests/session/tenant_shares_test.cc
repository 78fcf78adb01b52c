#include "service/session/tenant_shares.h"

#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "service/session/limit.h"
#include "service/session/memory_budget.h"

namespace structkv::session {
namespace {

TEST(TenantSharesTest, NoLimits) {
  TenantShares shares({});
  std::vector<TenantShares::Share> all;
  for (int i = 0; i < 100; ++i) {
    all.push_back(*shares.Take("a", {.sessions = 1, .memory_bytes = int64_t{1} << 50}));
  }
  EXPECT_EQ(shares.tenants(), 1);
  all.clear();
  EXPECT_EQ(shares.tenants(), 0);
}

TEST(TenantSharesTest, EachLimitIsItsOwn) {
  TenantShares shares({.max_sessions = 2, .memory_bytes = 100, .hold_bytes = 10});
  const auto prompt = shares.Take("a", {.sessions = 1, .memory_bytes = 60});
  ASSERT_TRUE(prompt.ok());
  EXPECT_EQ(shares.Take("a", {.sessions = 1, .memory_bytes = 41}).status(),
            MarkLimit(absl::ResourceExhaustedError("the tenant has 60 bytes of memory and asks for "
                                                   "41; at most 100 are allowed (--tenant-memory)"),
                      kTenantMemoryLimit));
  EXPECT_EQ(shares.Take("a", {.sessions = 2}).status().message(),
            "the tenant has 1 prompts and asks for 2; at most 2 are allowed "
            "(--tenant-max-sessions)");
  // What was refused took nothing.
  EXPECT_TRUE(shares.Take("a", {.sessions = 1, .memory_bytes = 40, .hold_bytes = 10}).ok());
  EXPECT_TRUE(shares.Take("b", {.sessions = 2, .memory_bytes = 100, .hold_bytes = 10}).ok());
}

TEST(TenantSharesTest, RefusalsNameTheLimit) {
  TenantShares shares({.max_sessions = 2, .memory_bytes = 100, .hold_bytes = 10});
  EXPECT_EQ(LimitOf(shares.Take("a", {.sessions = 3}).status()), kTenantMaxSessionsLimit);
  EXPECT_EQ(LimitOf(shares.Take("a", {.memory_bytes = 101}).status()), kTenantMemoryLimit);
  EXPECT_EQ(LimitOf(shares.Take("a", {.hold_bytes = 11}).status()), kTenantHoldBudgetLimit);
}

TEST(TenantSharesTest, WhatNeverFitsSaysSo) {
  TenantShares shares({.hold_bytes = 10});
  const auto held = shares.Take("a", {.hold_bytes = 10});
  EXPECT_FALSE(shares.Take("a", {.hold_bytes = 1}).status().GetPayload(kNeverFits).has_value());
  const absl::Status never = shares.Take("a", {.hold_bytes = 11}).status();
  EXPECT_TRUE(never.GetPayload(kNeverFits).has_value());
  EXPECT_EQ(never.message(),
            "the tenant has 10 bytes of held caches and asks for 11; at most 10 are allowed "
            "(--tenant-hold-budget)");
}

TEST(TenantSharesTest, GoesWithTheReservation) {
  TenantShares shares({.max_sessions = 1});
  MemoryBudget budget(100);
  Reservation moved;
  {
    absl::StatusOr<Reservation> reservation = budget.Reserve(10);
    ASSERT_TRUE(reservation.ok());
    reservation->Keep(*shares.Take("a", {.sessions = 1}));
    moved = *std::move(reservation);
  }
  EXPECT_FALSE(shares.Take("a", {.sessions = 1}).ok());
  moved.Release();
  EXPECT_EQ(shares.tenants(), 0);
  EXPECT_TRUE(shares.Take("a", {.sessions = 1}).ok());
}

TEST(TenantSharesTest, LimitsMayChangeUnderWhatIsTaken) {
  TenantShares shares({.max_sessions = 2});
  std::vector<TenantShares::Share> taken;
  for (int i = 0; i < 2; ++i) taken.push_back(*shares.Take("a", {.sessions = 1}));
  shares.SetLimits({.max_sessions = 1});
  EXPECT_EQ(shares.limits().max_sessions, 1);
  EXPECT_EQ(shares.Take("a", {.sessions = 1}).status().message(),
            "the tenant has 2 prompts and asks for 1; at most 1 are allowed "
            "(--tenant-max-sessions)");
  EXPECT_TRUE(shares.Take("b", {.sessions = 1}).ok());
  taken.pop_back();
  EXPECT_FALSE(shares.Take("a", {.sessions = 1}).ok());
  taken.clear();
  EXPECT_TRUE(shares.Take("a", {.sessions = 1}).ok());
  shares.SetLimits({});
  EXPECT_TRUE(shares.Take("a", {.sessions = 1'000}).ok());
}

TEST(TenantSharesTest, SharesMayOutliveIt) {
  TenantShares::Share share;
  {
    TenantShares shares({});
    share = *shares.Take("a", {.sessions = 1});
  }
  share.reset();
}

}  // namespace
}  // namespace structkv::session
