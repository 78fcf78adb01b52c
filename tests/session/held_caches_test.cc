// The caches that a server holds: who finds what, for how long, and whose memory makes room.
#include "service/session/held_caches.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "service/session/limit.h"
#include "service/transport/handle.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/numbers.h"

namespace structkv::session {
namespace {

using std::chrono::milliseconds;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr absl::Duration kLease = absl::Milliseconds(100);

class HeldCachesTest : public ::testing::Test {
 protected:
  // Reserves and publishes; nullopt where there is no room.
  std::optional<std::string> Hold(int64_t bytes, const std::string& tenant = "a",
                                  absl::Duration lease = kLease) {
    absl::StatusOr<Reservation> reservation = caches_.Reserve(bytes);
    if (!reservation.ok()) return std::nullopt;
    auto cache = std::make_unique<HeldCache>();
    cache->reservation = *std::move(reservation);
    cache->size_bytes = bytes;
    return caches_.Publish(std::move(cache), tenant, lease);
  }
  bool Finds(const std::string& handle, const std::string& tenant = "a") {
    return caches_.Find(handle, tenant).ok();
  }
  int64_t reserved() const { return caches_.budget().reserved_bytes(); }

  const std::shared_ptr<testkit::FakeClock> clock_ = std::make_shared<testkit::FakeClock>();
  HeldCaches caches_{{.budget_bytes = 1000,
                      .default_lease = absl::Milliseconds(50),
                      .max_lease = absl::Milliseconds(500)},
                     clock_};
};

TEST_F(HeldCachesTest, IsFoundUntilItsLeaseRunsOut) {
  const std::string handle = *Hold(100);
  EXPECT_EQ(handle.size(), transport::kHandleBytes);
  clock_->Advance(milliseconds(99));
  EXPECT_TRUE(Finds(handle));
  EXPECT_EQ((*caches_.Find(handle, "a"))->size_bytes, 100);
  clock_->Advance(milliseconds(1));
  EXPECT_FALSE(Finds(handle));
  EXPECT_EQ(caches_.count(), 1) << "nobody has looked";
  caches_.DropExpired();
  EXPECT_EQ(caches_.count(), 0);
  EXPECT_EQ(reserved(), 0);
}

TEST_F(HeldCachesTest, ARenewalBeginsTheLeaseAnew) {
  const std::string handle = *Hold(100);
  for (int i = 0; i < 5; ++i) {
    clock_->Advance(milliseconds(80));
    const absl::StatusOr<absl::Duration> lease = caches_.Renew(handle, "a", std::nullopt);
    ASSERT_TRUE(lease.ok()) << lease.status();
    EXPECT_EQ(*lease, kLease);
  }
  ASSERT_EQ(*caches_.Renew(handle, "a", 300), absl::Milliseconds(300));
  clock_->Advance(milliseconds(299));
  caches_.DropExpired();
  ASSERT_EQ(*caches_.Renew(handle, "a", std::nullopt), absl::Milliseconds(300)) << "kept";
  clock_->Advance(milliseconds(300));
  EXPECT_TRUE(absl::IsNotFound(caches_.Renew(handle, "a", std::nullopt).status()));
}

TEST_F(HeldCachesTest, LeasesHaveLimits) {
  EXPECT_EQ(*caches_.Lease(std::nullopt, "x"), absl::Milliseconds(50));
  EXPECT_EQ(*caches_.Lease(1, "x"), absl::Milliseconds(1));
  EXPECT_EQ(*caches_.Lease(500, "x"), absl::Milliseconds(500));
  for (const uint64_t millis : {uint64_t{0}, uint64_t{501}, ~uint64_t{0}}) {
    const absl::Status status = caches_.Lease(millis, "open.hold.lease_millis").status();
    EXPECT_TRUE(absl::IsInvalidArgument(status));
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr("open.hold.lease_millis is " + std::to_string(millis)),
                      HasSubstr("1 to 500")));
  }
  const std::string handle = *Hold(1);
  EXPECT_THAT(std::string(caches_.Renew(handle, "a", 501).status().message()),
              HasSubstr("lease_millis is 501; 1 to 500"));
}

TEST_F(HeldCachesTest, LeasesThatBeginAfterAChangeAreOfTheNewLength) {
  const std::string before = *Hold(100, "a", *caches_.Lease(std::nullopt, "lease"));
  caches_.SetLeases(absl::Milliseconds(200), absl::Milliseconds(300));
  EXPECT_EQ(*caches_.Lease(std::nullopt, "lease"), absl::Milliseconds(200));
  EXPECT_TRUE(caches_.Lease(300, "lease").ok());
  EXPECT_EQ(caches_.Lease(301, "lease").status().message(), "lease is 301; 1 to 300 are allowed");
  EXPECT_EQ(caches_.budget().limit_bytes(), 1000);
  clock_->Advance(milliseconds(50));
  EXPECT_FALSE(Finds(before));
}

TEST_F(HeldCachesTest, UnknownReleasedExpiredAndAnothersAreTheSame) {
  const std::string handle = *Hold(10);
  const std::string released = *Hold(10);
  const std::string expired = *Hold(10, "a", absl::Milliseconds(1));
  ASSERT_TRUE(caches_.Release(released, "a").ok());
  clock_->Advance(milliseconds(1));
  const absl::Status unknown =
      caches_.Find(std::string(transport::kHandleBytes, 'x'), "a").status();
  EXPECT_TRUE(absl::IsNotFound(unknown)) << unknown;
  EXPECT_EQ(caches_.Find(handle, "b").status(), unknown);
  EXPECT_EQ(caches_.Find(handle, "").status(), unknown);
  EXPECT_EQ(caches_.Find(released, "a").status(), unknown);
  EXPECT_EQ(caches_.Find(expired, "a").status(), unknown);
  EXPECT_EQ(caches_.Renew(handle, "b", std::nullopt).status(), unknown);
  EXPECT_EQ(caches_.Release(handle, "b"), unknown);
  EXPECT_EQ(caches_.Release(released, "a"), unknown);
  EXPECT_TRUE(Finds(handle));
  for (const std::string& wrong : {std::string(), handle.substr(1), handle + "x"}) {
    const absl::Status status = caches_.Find(wrong, "a").status();
    EXPECT_TRUE(absl::IsInvalidArgument(status));
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("handle is " + std::to_string(wrong.size()) + " bytes long; 16"));
  }
}

TEST_F(HeldCachesTest, TheOldestExpiredMakesRoomFirst) {
  const std::string late = *Hold(300, "a", absl::Milliseconds(30));
  const std::string early = *Hold(300, "a", absl::Milliseconds(10));
  const std::string alive = *Hold(300, "a", absl::Milliseconds(500));
  EXPECT_FALSE(Hold(200).has_value()) << "none has expired";
  clock_->Advance(milliseconds(40));
  ASSERT_TRUE(Hold(200).has_value());
  EXPECT_EQ(reserved(), 300 + 300 + 200) << "one was enough";
  EXPECT_EQ(caches_.count(), 3);
  // What is left is the one that expired later: at its time, it could still be renewed.
  ASSERT_TRUE(Hold(500).has_value());
  EXPECT_EQ(caches_.count(), 3);
  EXPECT_TRUE(Finds(alive));
  EXPECT_FALSE(Hold(1).has_value()) << "the living stay";
}

TEST_F(HeldCachesTest, WhatIsReadKeepsItsMemoryAndIsNotFoundAgain) {
  const std::string handle = *Hold(600);
  std::shared_ptr<const HeldCache> reader = *caches_.Find(handle, "a");
  clock_->Advance(milliseconds(100));
  EXPECT_FALSE(Finds(handle));
  EXPECT_FALSE(Hold(600).has_value()) << "its memory was taken from under the reader";
  EXPECT_EQ(reader->size_bytes, 600);
  EXPECT_EQ(reserved(), 600);
  reader.reset();
  EXPECT_EQ(reserved(), 0);
  EXPECT_TRUE(Hold(600).has_value());
}

TEST_F(HeldCachesTest, ReleasedWhileItIsRead) {
  const std::string handle = *Hold(600);
  std::shared_ptr<const HeldCache> reader = *caches_.Find(handle, "a");
  ASSERT_TRUE(caches_.Release(handle, "a").ok());
  EXPECT_EQ(caches_.count(), 0);
  EXPECT_EQ(reserved(), 600);
  reader.reset();
  EXPECT_EQ(reserved(), 0);
}

TEST_F(HeldCachesTest, RefusalsSayWhichBudget) {
  const std::string handle = *Hold(600);
  const absl::Status taken = caches_.Reserve(401).status();
  EXPECT_TRUE(absl::IsResourceExhausted(taken));
  EXPECT_FALSE(taken.GetPayload(kNeverFits).has_value());
  EXPECT_THAT(std::string(taken.message()), AllOf(HasSubstr("--hold-budget"), HasSubstr("401"),
                                                  HasSubstr("600"), HasSubstr("1000")));
  EXPECT_EQ(LimitOf(taken), kHoldBudgetLimit);
  const absl::Status never = caches_.Reserve(1001).status();
  EXPECT_TRUE(never.GetPayload(kNeverFits).has_value());
  EXPECT_EQ(LimitOf(never), kHoldBudgetLimit);
  EXPECT_TRUE(Finds(handle));
}

TEST(HeldCachesOffTest, NothingIsHeldWithoutABudget) {
  HeldCaches caches({});
  EXPECT_TRUE(absl::IsUnimplemented(caches.CheckEnabled()));
  EXPECT_TRUE(absl::IsUnimplemented(caches.Find(std::string(16, 'x'), "").status()));
  EXPECT_TRUE(absl::IsUnimplemented(caches.Release(std::string(16, 'x'), "")));
}

// Against a model, with every action at random.
class HeldCachesRandomTest : public HeldCachesTest,
                             public ::testing::WithParamInterface<uint64_t> {};

TEST_P(HeldCachesRandomTest, AgreesWithItsModel) {
  struct Modelled {
    int64_t bytes = 0;
    std::string tenant;
    int64_t lease = 0;
    int64_t expires = 0;
    bool dropped = false;  // expired and gone, or released
    int readers = 0;
  };
  testkit::Random random(GetParam());
  std::map<std::string, Modelled> model;  // by handle
  std::vector<std::pair<std::string, std::shared_ptr<const HeldCache>>> readers;
  int64_t now = 0;
  const auto used = [&] {
    int64_t bytes = 0;
    for (const auto& [handle, cache] : model) {
      if (!cache.dropped || cache.readers > 0) bytes += cache.bytes;
    }
    return bytes;
  };
  const auto oldest_expired = [&]() -> Modelled* {
    Modelled* oldest = nullptr;
    for (auto& [handle, cache] : model) {
      if (cache.dropped || cache.expires > now) continue;
      if (oldest == nullptr || cache.expires < oldest->expires) oldest = &cache;
    }
    return oldest;
  };
  for (int step = 0; step < 3000; ++step) {
    const std::string tenant = random.Chance(50) ? "a" : "b";
    std::string handle(transport::kHandleBytes, '?');
    if (!model.empty() && random.Chance(95)) {
      handle = std::next(model.begin(), random.Between(0, static_cast<int64_t>(model.size()) - 1))
                   ->first;
    }
    const auto known = model.find(handle);
    const bool finds = known != model.end() && !known->second.dropped &&
                       known->second.expires > now && known->second.tenant == tenant;
    switch (random.Between(0, 6)) {
      case 0: {
        // No two expire at once, so that the order is one.
        const int64_t bytes = random.Between(1, 400);
        const int64_t lease = random.Between(1, 500);
        const bool unique = std::none_of(model.begin(), model.end(), [&](const auto& each) {
          return each.second.expires == now + lease;
        });
        if (!unique) break;
        while (used() + bytes > 1000) {
          Modelled* oldest = oldest_expired();
          if (oldest == nullptr) break;
          oldest->dropped = true;
        }
        const bool fits = used() + bytes <= 1000;
        const auto held = Hold(bytes, tenant, absl::Milliseconds(lease));
        ASSERT_EQ(held.has_value(), fits) << "step " << step;
        if (fits) model[*held] = {bytes, tenant, lease, now + lease};
        break;
      }
      case 1:
        ASSERT_EQ(Finds(handle, tenant), finds) << "step " << step;
        break;
      case 2: {
        auto found = caches_.Find(handle, tenant);
        ASSERT_EQ(found.ok(), finds) << "step " << step;
        if (!finds) break;
        readers.emplace_back(handle, *std::move(found));
        ++known->second.readers;
        break;
      }
      case 3:
        if (!readers.empty()) {
          const auto at =
              readers.begin() + random.Between(0, static_cast<int64_t>(readers.size()) - 1);
          --model[at->first].readers;
          readers.erase(at);
        }
        break;
      case 4: {
        const int64_t lease = finds ? known->second.lease : 1;
        const bool unique = std::none_of(model.begin(), model.end(), [&](const auto& each) {
          return each.second.expires == now + lease && each.first != handle;
        });
        if (!unique) break;
        const auto renewed = caches_.Renew(handle, tenant, std::nullopt);
        ASSERT_EQ(renewed.ok(), finds) << "step " << step;
        if (finds) known->second.expires = now + lease;
        break;
      }
      case 5:
        if (random.Chance(70)) {
          const int64_t by = random.Between(1, 60);
          clock_->Advance(milliseconds(by));
          now += by;
        } else {
          caches_.DropExpired();
          while (Modelled* oldest = oldest_expired()) oldest->dropped = true;
        }
        break;
      default:
        if (!random.Chance(30)) break;
        ASSERT_EQ(caches_.Release(handle, tenant).ok(), finds) << "step " << step;
        if (finds) known->second.dropped = true;
    }
    ASSERT_EQ(reserved(), used()) << "step " << step;
  }
  readers.clear();
  clock_->Advance(milliseconds(1000));
  caches_.DropExpired();
  EXPECT_EQ(reserved(), 0);
  EXPECT_EQ(caches_.count(), 0);
}

INSTANTIATE_TEST_SUITE_P(, HeldCachesRandomTest, ::testing::Range<uint64_t>(1, 9));

TEST_F(HeldCachesTest, FromManyThreads) {
  std::atomic<int> found = 0;
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      testkit::Random random(static_cast<uint64_t>(i));
      for (int n = 0; n < 2000; ++n) {
        const auto handle = Hold(random.Between(1, 300));
        if (handle.has_value()) {
          if (random.Chance(50)) caches_.Renew(*handle, "a", 10).IgnoreError();
          const auto reader = caches_.Find(*handle, "a");
          if (reader.ok()) ++found;
          if (random.Chance(70)) caches_.Release(*handle, "a").IgnoreError();
        }
        clock_->Advance(milliseconds(1));
        if (random.Chance(20)) caches_.DropExpired();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(found.load(), 0);
  clock_->Advance(milliseconds(1000));
  caches_.DropExpired();
  EXPECT_EQ(reserved(), 0);
}

}  // namespace
}  // namespace structkv::session
