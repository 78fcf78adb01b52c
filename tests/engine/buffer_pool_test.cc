#include "service/engine/buffer_pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
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
