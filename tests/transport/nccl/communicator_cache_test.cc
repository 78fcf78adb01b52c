#include "service/transport/nccl/communicator_cache.h"

#include <algorithm>
#include <deque>
#include <optional>
#include <random>
#include <set>

#include "gtest/gtest.h"

namespace structkv::nccl {
namespace {

bool All(uint64_t) { return true; }

TEST(CommunicatorCacheTest, EvictsTheLeastRecentlyUsedThatIsIdle) {
  CommunicatorCache cache(3);
  for (uint64_t pair : {1, 2, 3}) EXPECT_TRUE(cache.Acquire(pair));
  cache.Touch(1);
  EXPECT_EQ(cache.Evict(All), std::nullopt);  // nobody waits
  EXPECT_FALSE(cache.Acquire(4));
  EXPECT_EQ(cache.Evict([](uint64_t pair) { return pair != 2; }), 3u);
  EXPECT_EQ(cache.Evict(All), std::nullopt);  // one leaves for the one that waits
  EXPECT_EQ(cache.size(), 3);
  EXPECT_EQ(cache.Release(3), 4u);
  EXPECT_TRUE(cache.Acquire(4));
  EXPECT_EQ(cache.waiting(), 0);
}

TEST(CommunicatorCacheTest, ThoseWhoWaitComeInTheirOrder) {
  CommunicatorCache cache(1);
  EXPECT_TRUE(cache.Acquire(1));
  EXPECT_FALSE(cache.Acquire(2));
  EXPECT_FALSE(cache.Acquire(3));
  EXPECT_FALSE(cache.Acquire(2));
  EXPECT_EQ(cache.waiting(), 2);
  EXPECT_EQ(cache.Evict(All), 1u);
  EXPECT_FALSE(cache.Acquire(1));  // it leaves, and would come back
  EXPECT_EQ(cache.Release(1), 2u);
  cache.Quarantine(3);  // gives up
  EXPECT_EQ(cache.Release(2), 1u);
  EXPECT_EQ(cache.Release(7), std::nullopt);
}

TEST(CommunicatorCacheTest, QuarantineTakesAPlaceUntilTheEnd) {
  CommunicatorCache cache(1);
  EXPECT_TRUE(cache.Acquire(1));
  cache.Quarantine(1);
  cache.Quarantine(1);
  EXPECT_FALSE(cache.Acquire(2));
  EXPECT_EQ(cache.Evict(All), std::nullopt);
  EXPECT_EQ(cache.Release(1), 2u);
  EXPECT_EQ(cache.Evict(All), std::nullopt);
  EXPECT_FALSE(cache.Acquire(3));
  EXPECT_EQ(cache.Evict(All), 2u);
}

// Whatever happens, nobody has more than a place, there are never more than allowed, and who waits
// gets one in the end.
TEST(CommunicatorCacheTest, KeepsItsAccountUnderRandomUse) {
  std::mt19937 random(20);
  CommunicatorCache cache(4);
  std::set<uint64_t> have;
  std::set<uint64_t> leaving;
  std::deque<uint64_t> waiting;
  const auto forget = [&](uint64_t pair) {
    waiting.erase(std::remove(waiting.begin(), waiting.end(), pair), waiting.end());
  };
  const auto release = [&](uint64_t pair) {
    have.erase(pair);
    leaving.erase(pair);
    const auto next = cache.Release(pair);
    if (waiting.empty()) {
      EXPECT_EQ(next, std::nullopt);
    } else {
      ASSERT_EQ(next, waiting.front());
      waiting.pop_front();
      have.insert(*next);
    }
  };
  for (int step = 0; step < 20000; ++step) {
    const uint64_t pair = random() % 12;
    switch (random() % 4) {
      case 0:
      case 1:
        if (cache.Acquire(pair)) {
          EXPECT_EQ(leaving.count(pair), 0u);
          have.insert(pair);
        } else if (std::find(waiting.begin(), waiting.end(), pair) == waiting.end()) {
          waiting.push_back(pair);
        }
        break;
      case 2:
        if (have.count(pair) == 0) {
          cache.Quarantine(pair);
          forget(pair);
        } else if (leaving.count(pair) != 0) {
          release(pair);
        } else {
          cache.Quarantine(pair);
          forget(pair);
          leaving.insert(pair);
        }
        break;
      default:
        if (const auto victim = cache.Evict(All)) {
          EXPECT_EQ(have.count(*victim), 1u);
          EXPECT_TRUE(leaving.insert(*victim).second);
        } else {
          EXPECT_TRUE(waiting.size() <= leaving.size() || leaving.size() == have.size());
        }
    }
    ASSERT_EQ(cache.size(), static_cast<int>(have.size()));
    ASSERT_EQ(cache.waiting(), static_cast<int>(waiting.size()));
    ASSERT_LE(cache.size(), 4);
  }
}

}  // namespace
}  // namespace structkv::nccl
