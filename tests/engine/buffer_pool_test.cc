#include "service/engine/buffer_pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace structkv::engine {
namespace {

constexpr size_t kMiB = size_t{1} << 20;

size_t PageBytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// Whether the system has a mapping at that page.
bool IsMapped(void* page) {
  unsigned char resident = 0;
  return mincore(page, 1, &resident) == 0 || errno != ENOMEM;
}

// Stands for a backend's pinning: knows what is pinned, and fails what a device would not forgive.
class Pinning {
 public:
  explicit Pinning(int64_t least_bytes = 0) : least_bytes_(least_bytes) {}
  ~Pinning() { EXPECT_TRUE(pinned_.empty()) << "something stayed pinned"; }

  HostPinning Make() {
    return {.least_bytes = least_bytes_,
            .pin =
                [this](void* data, int64_t bytes) {
                  const std::lock_guard lock(mutex_);
                  ++pins_;
                  EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % PageBytes(), 0U);
                  EXPECT_EQ(static_cast<size_t>(bytes) % PageBytes(), 0U);
                  if (fails_) return false;
                  EXPECT_TRUE(pinned_.emplace(static_cast<std::byte*>(data), bytes).second);
                  return true;
                },
            .unpin =
                [this](void* data) {
                  const std::lock_guard lock(mutex_);
                  const auto found = pinned_.find(static_cast<std::byte*>(data));
                  ASSERT_NE(found, pinned_.end());
                  EXPECT_TRUE(IsMapped(data));
                  EXPECT_TRUE(IsMapped(found->first + found->second - PageBytes()));
                  pinned_.erase(found);
                }};
  }
  void Fail() { fails_ = true; }
  int pins() const { return pins_; }
  int64_t bytes() const {
    int64_t all = 0;
    for (const auto& [data, bytes] : pinned_) all += bytes;
    return all;
  }

 private:
  const int64_t least_bytes_;
  std::mutex mutex_;
  std::map<std::byte*, int64_t> pinned_;
  int pins_ = 0;
  bool fails_ = false;
};

TEST(BufferPoolTest, WhatIsReusedIsPinnedOnce) {
  Pinning pinning;
  BufferPool pool(4 * kMiB, pinning.Make());
  pool.Acquire(kMiB).Reset();
  EXPECT_EQ(pinning.pins(), 0);
  for (int i = 0; i < 3; ++i) pool.AcquirePinned(kMiB).Reset();
  EXPECT_EQ(pinning.pins(), 1) << "the run that was there, once";
  EXPECT_EQ(pool.pinned_bytes(), kMiB);
  EXPECT_EQ(pinning.bytes(), static_cast<int64_t>(kMiB));
  const Buffer first = pool.AcquirePinned(kMiB);
  const Buffer second = pool.AcquirePinned(kMiB);
  EXPECT_EQ(pinning.pins(), 2);
  EXPECT_EQ(pool.pinned_bytes(), 2 * kMiB);
}

TEST(BufferPoolTest, WhatGoesBackToTheSystemIsUnpinnedFirst) {
  Pinning pinning;
  Buffer outlives;
  {
    BufferPool pool(kMiB, pinning.Make());
    BufferAllowance allowance = pool.Allow(8 * kMiB);
    outlives = pool.AcquirePinned(2 * kMiB);
    {
      const Buffer a = pool.AcquirePinned(kMiB);
      const Buffer b = pool.AcquirePinned(3 * kMiB);
    }
    EXPECT_EQ(pool.pinned_bytes(), 6 * kMiB);
    allowance.Release();
    EXPECT_EQ(pinning.bytes() - static_cast<int64_t>(pool.idle_bytes()),
              static_cast<int64_t>(2 * kMiB));
    EXPECT_EQ(pool.idle_bytes(), kMiB);
  }
  EXPECT_EQ(pinning.bytes(), static_cast<int64_t>(3 * kMiB)) << "and what was idle";
  std::memset(outlives.data(), 0x5A, outlives.size());
}

TEST(BufferPoolTest, WhatIsCutIsNotPinnedAnyMore) {
  Pinning pinning;
  BufferPool pool(4 * kMiB, pinning.Make());
  pool.AcquirePinned(kMiB).Reset();
  Buffer buffer = pool.AcquirePinned(kMiB - 100 * 1024);
  EXPECT_EQ(pool.pinned_bytes(), kMiB);
  buffer.Trim();
  EXPECT_EQ(pool.pinned_bytes(), 0U);
  Buffer moved = std::move(buffer);
  std::memset(moved.data(), 0x5A, moved.size());
  moved.Reset();
  EXPECT_EQ(pool.pinned_bytes(), 0U);
}

TEST(BufferPoolTest, WhatIsSmallOrCannotBePinnedIsAsGood) {
  Pinning pinning(static_cast<int64_t>(kMiB));
  BufferPool pool(4 * kMiB, pinning.Make());
  const Buffer small = pool.AcquirePinned(kMiB - PageBytes());
  EXPECT_EQ(pinning.pins(), 0);
  pinning.Fail();
  const Buffer large = pool.AcquirePinned(kMiB);
  EXPECT_EQ(pinning.pins(), 1);
  EXPECT_EQ(pool.pinned_bytes(), 0U);
  std::memset(large.data(), 0x5A, large.size());
  BufferPool without(0);
  const Buffer plain = without.AcquirePinned(kMiB);
  std::memset(plain.data(), 0x5A, plain.size());
  EXPECT_EQ(without.pinned_bytes(), 0U);
}

TEST(BufferPoolTest, BuffersArePageAlignedAndWritable) {
  BufferPool pool(0);
  for (const size_t size : {size_t{1}, PageBytes(), PageBytes() + 1, 5 * kMiB + 3}) {
    const Buffer buffer = pool.Acquire(size);
    EXPECT_EQ(buffer.size(), size);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % PageBytes(), 0U);
    std::memset(buffer.data(), 0x5A, size);
    EXPECT_EQ(buffer.data()[size - 1], std::byte{0x5A});
  }
}

TEST(BufferPoolTest, NothingIsAnEmptyBuffer) {
  BufferPool pool(kMiB);
  const Buffer buffer = pool.Acquire(0);
  EXPECT_TRUE(buffer.empty());
  EXPECT_EQ(buffer.data(), nullptr);
  EXPECT_EQ(pool.in_use_bytes(), 0U);
}

TEST(BufferPoolTest, TrimmedBuffersHoldTheirPagesAlone) {
  BufferPool pool(4 * kMiB);
  pool.Acquire(kMiB).Reset();
  Buffer buffer = pool.Acquire(kMiB - 100 * 1024 + 1);
  EXPECT_EQ(pool.in_use_bytes(), kMiB) << "the one that was there";
  std::memset(buffer.data(), 0x5A, buffer.size());
  buffer.Trim();
  const size_t pages = (buffer.size() + PageBytes() - 1) / PageBytes() * PageBytes();
  EXPECT_EQ(pool.in_use_bytes(), pages);
  EXPECT_EQ(buffer.data()[buffer.size() - 1], std::byte{0x5A});
  buffer.Trim();
  EXPECT_EQ(pool.in_use_bytes(), pages);
  buffer.Reset();
  EXPECT_EQ(pool.idle_bytes(), pages);
  Buffer again = pool.Acquire(pages);
  std::memset(again.data(), 1, pages);
  Buffer lent = Buffer::Borrowed(again.data(), 1);
  lent.Trim();
  EXPECT_EQ(pool.in_use_bytes(), pages);
}

TEST(BufferPoolTest, CountsWholePagesInUseAndIdle) {
  BufferPool pool(kMiB);
  Buffer buffer = pool.Acquire(1);
  EXPECT_EQ(pool.in_use_bytes(), PageBytes());
  EXPECT_EQ(pool.idle_bytes(), 0U);
  buffer.Reset();
  EXPECT_EQ(pool.in_use_bytes(), 0U);
  EXPECT_EQ(pool.idle_bytes(), PageBytes());
  EXPECT_TRUE(buffer.empty());
  buffer.Reset();  // twice is once
  EXPECT_EQ(pool.idle_bytes(), PageBytes());
}

TEST(BufferPoolTest, RemembersTheMostThatWasInUse) {
  BufferPool pool(8 * kMiB);
  EXPECT_EQ(pool.peak_in_use_bytes(), 0U);
  Buffer first = pool.Acquire(kMiB);
  Buffer second = pool.Acquire(2 * kMiB);
  first.Reset();
  EXPECT_EQ(pool.peak_in_use_bytes(), 3 * kMiB);
  const Buffer reused = pool.Acquire(kMiB);
  EXPECT_EQ(pool.peak_in_use_bytes(), 3 * kMiB);
  const Buffer more = pool.Acquire(kMiB);
  EXPECT_EQ(pool.peak_in_use_bytes(), 4 * kMiB);
}

TEST(BufferPoolTest, ReturnedMemoryIsReused) {
  BufferPool pool(8 * kMiB);
  Buffer first = pool.Acquire(kMiB);
  std::byte* const data = first.data();
  first.Reset();
  const Buffer second = pool.Acquire(kMiB - 100);
  EXPECT_EQ(second.data(), data);
  EXPECT_EQ(second.size(), kMiB - 100);
  EXPECT_EQ(pool.idle_bytes(), 0U);
  EXPECT_EQ(pool.in_use_bytes(), kMiB);
}

TEST(BufferPoolTest, TheBestFitIsReused) {
  BufferPool pool(64 * kMiB);
  Buffer large = pool.Acquire(kMiB + kMiB / 16);
  Buffer fitting = pool.Acquire(kMiB);
  std::byte* const data = fitting.data();
  large.Reset();
  fitting.Reset();
  EXPECT_EQ(pool.Acquire(kMiB).data(), data);
}

TEST(BufferPoolTest, AMuchLargerRunIsNotGivenAway) {
  BufferPool pool(64 * kMiB);
  pool.Acquire(32 * kMiB).Reset();
  const Buffer small = pool.Acquire(kMiB);
  EXPECT_EQ(pool.in_use_bytes(), kMiB);
  EXPECT_EQ(pool.idle_bytes(), 32 * kMiB);
}

TEST(BufferPoolTest, MemoryBeyondTheIdleLimitGoesBackToTheSystem) {
  BufferPool pool(2 * kMiB);
  std::vector<std::pair<Buffer, std::byte*>> buffers;
  for (int i = 0; i < 4; ++i) {
    Buffer buffer = pool.Acquire(kMiB);
    std::byte* const data = buffer.data();
    buffers.emplace_back(std::move(buffer), data);
  }
  for (auto& [buffer, data] : buffers) buffer.Reset();
  EXPECT_EQ(pool.idle_bytes(), 2 * kMiB);
  // What was returned first was idle for the longest time.
  EXPECT_FALSE(IsMapped(buffers[0].second));
  EXPECT_FALSE(IsMapped(buffers[1].second));
  EXPECT_TRUE(IsMapped(buffers[2].second));
  EXPECT_TRUE(IsMapped(buffers[3].second));
}

TEST(BufferPoolTest, AnAllowanceKeepsMoreForReuse) {
  BufferPool pool(2 * kMiB);
  BufferAllowance allowance = pool.Allow(32 * kMiB);
  std::byte* first = nullptr;
  {
    const Buffer a = pool.Acquire(16 * kMiB);
    const Buffer b = pool.Acquire(12 * kMiB);
    first = a.data();
  }
  EXPECT_EQ(pool.idle_bytes(), 28 * kMiB);
  {
    const Buffer again = pool.Acquire(16 * kMiB);
    EXPECT_EQ(again.data(), first);
    // No more than is allowed in all: what lies idle makes room before more is mapped.
    const Buffer other = pool.Acquire(5 * kMiB);
    EXPECT_EQ(pool.in_use_bytes(), 21 * kMiB);
    EXPECT_EQ(pool.idle_bytes(), 0U);
  }
  EXPECT_EQ(pool.idle_bytes(), 21 * kMiB);
  BufferAllowance second = pool.Allow(20 * kMiB);
  allowance.Release();
  EXPECT_EQ(pool.idle_bytes(), 16 * kMiB);  // the one that was returned last
  second = BufferAllowance();
  EXPECT_EQ(pool.idle_bytes(), 0U);
}

TEST(BufferPoolTest, ALimitOfNothingKeepsNothing) {
  BufferPool pool(0);
  Buffer buffer = pool.Acquire(kMiB);
  std::byte* const data = buffer.data();
  buffer.Reset();
  EXPECT_EQ(pool.idle_bytes(), 0U);
  EXPECT_FALSE(IsMapped(data));
}

TEST(BufferPoolTest, BuffersOutliveThePool) {
  auto pool = std::make_unique<BufferPool>(kMiB);
  Buffer kept = pool->Acquire(100);
  Buffer idle = pool->Acquire(100);
  std::byte* const idle_data = idle.data();
  std::byte* const kept_data = kept.data();
  idle.Reset();
  pool.reset();
  std::memset(kept.data(), 1, kept.size());
  kept.Reset();
  EXPECT_FALSE(IsMapped(idle_data));
  EXPECT_FALSE(IsMapped(kept_data));
}

TEST(BufferTest, MovingLeavesAnEmptyBuffer) {
  BufferPool pool(kMiB);
  Buffer a = pool.Acquire(10);
  std::byte* const data = a.data();
  Buffer b = std::move(a);
  EXPECT_TRUE(a.empty());  // NOLINT(bugprone-use-after-move): that is what is tested
  EXPECT_EQ(a.data(), nullptr);
  EXPECT_EQ(b.data(), data);
  Buffer c = pool.Acquire(10);
  c = std::move(b);  // gives back what c had
  EXPECT_EQ(c.data(), data);
  EXPECT_EQ(pool.in_use_bytes(), PageBytes());
  Buffer& self = c;
  c = std::move(self);
  EXPECT_EQ(c.data(), data);
}

TEST(BufferTest, BorrowedMemoryIsNotFreed) {
  std::vector<float> values = {1, 2, 3};
  {
    const Buffer buffer = Buffer::Borrowed(values.data(), values.size() * sizeof(float));
    EXPECT_EQ(buffer.as<float>()[2], 3.0F);
    EXPECT_EQ(buffer.span().size(), 12U);
  }
  EXPECT_EQ(values[0], 1.0F);
}

TEST(BufferPoolTest, ThreadsShareIt) {
  BufferPool pool(4 * kMiB);
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&pool, seed] {
      std::mt19937 random(seed);
      std::vector<Buffer> held(4);
      for (int i = 0; i < 300; ++i) {
        Buffer buffer = pool.Acquire(random() % (64 * 1024) + 1);
        const auto mark = static_cast<std::byte>(seed);
        buffer.data()[0] = mark;
        buffer.data()[buffer.size() - 1] = mark;
        Buffer& slot = held[random() % held.size()];
        if (!slot.empty()) {
          EXPECT_EQ(slot.data()[0], mark);  // nobody else wrote there
        }
        slot = std::move(buffer);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool.in_use_bytes(), 0U);
  EXPECT_LE(pool.idle_bytes(), 4 * kMiB);
}

}  // namespace
}  // namespace structkv::engine
