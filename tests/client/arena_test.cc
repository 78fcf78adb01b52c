// Blocks of a region: where they lie, that they never overlap, and that all of them come back.
#include "structkv/arena.h"

#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/numbers.h"

namespace structkv::client {
namespace {

using ::testing::HasSubstr;
using testkit::Random;

std::shared_ptr<Arena> NewArena(size_t bytes) {
  RegionOptions options;
  options.size_bytes = bytes;
  options.prefault = false;
  return std::make_shared<Arena>(*Region::Create(options));
}

TEST(ArenaTest, BlocksAreAlignedAndLieInTheRegion) {
  const auto arena = NewArena(1 << 16);
  for (const size_t alignment : {1, 64, 256, 4096}) {
    const absl::StatusOr<Bytes> block = arena->Allocate(100, alignment);
    ASSERT_TRUE(block.ok()) << block.status();
    EXPECT_EQ(block->size(), 100);
    const auto offset = arena->region()->OffsetOf(block->span());
    ASSERT_TRUE(offset.has_value());
    EXPECT_EQ(*offset % std::max<size_t>(alignment, Arena::kAlignment), 0);
  }
}

TEST(ArenaTest, OffsetsAreOfWhollyContainedBytesAlone) {
  const auto arena = NewArena(4096);
  const Region& region = *arena->region();
  std::byte* data = region.data();
  EXPECT_EQ(region.OffsetOf({data, 4096}), 0);
  EXPECT_EQ(region.OffsetOf({data + 4095, 1}), 4095);
  EXPECT_EQ(region.OffsetOf({data + 1, 4096}), std::nullopt);
  EXPECT_EQ(region.OffsetOf({data + 4096, 1}), std::nullopt);
  EXPECT_EQ(region.OffsetOf({data, SIZE_MAX}), std::nullopt);
  EXPECT_EQ(region.OffsetOf({data, 0}), std::nullopt);
  EXPECT_EQ(region.OffsetOf({data - 1, 2}), std::nullopt);
}

TEST(ArenaTest, ExhaustionSaysWhatIsFree) {
  const auto arena = NewArena(4096);
  std::vector<Bytes> blocks;
  for (int i = 0; i < 4; ++i) blocks.push_back(*arena->Allocate(1024));
  blocks[0] = Bytes();
  blocks[2] = Bytes();
  const absl::StatusOr<Bytes> none = arena->Allocate(1025);
  EXPECT_EQ(none.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(none.status().message()),
              HasSubstr("no block of 1088 bytes: 2048 of 4096 are free, at most 1024"));
  EXPECT_EQ(arena->free_bytes(), 2048);
  EXPECT_EQ(arena->largest_free_bytes(), 1024);
  EXPECT_EQ(arena->Allocate(SIZE_MAX).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(arena->Allocate(1024).ok());
}

TEST(ArenaTest, RefusesAlignmentsThatItCannotGive) {
  const auto arena = NewArena(4096);
  for (const size_t alignment : {0, 3, 8192}) {
    EXPECT_EQ(arena->Allocate(64, alignment).status().code(), absl::StatusCode::kInvalidArgument)
        << alignment;
  }
  EXPECT_TRUE(arena->Allocate(0)->empty());
}

TEST(ArenaTest, BlocksAndTheirRegionOutliveTheArena) {
  auto arena = NewArena(4096);
  const std::weak_ptr<Region> region = arena->region();
  Bytes block = *arena->Allocate(4096);
  arena.reset();
  std::memset(block.data(), 7, block.size());
  EXPECT_FALSE(region.expired());
  const Bytes copy = block;
  block = Bytes();
  EXPECT_EQ(copy.span()[4095], std::byte{7});
  EXPECT_FALSE(region.expired());
}

TEST(ArenaTest, AllocatesResultsOfASession) {
  const auto arena = NewArena(4096);
  const ResultAllocator allocate = AllocateFrom(arena);
  const absl::StatusOr<Bytes> block = allocate(0, v1::TENSOR_KEYS, 4000);
  ASSERT_TRUE(block.ok()) << block.status();
  EXPECT_TRUE(arena->region()->OffsetOf(block->span()).has_value());
  EXPECT_EQ(allocate(0, v1::TENSOR_VALUES, 4000).status().code(),
            absl::StatusCode::kResourceExhausted);
}

// Against a model that knows who has each unit of 64 bytes: the arena gives what lies free, and
// refuses only where no run is long enough.
TEST(ArenaTest, IsWhatAModelSays) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    constexpr size_t kUnits = 256;
    const auto arena = NewArena(kUnits * 64);
    std::vector<bool> taken(kUnits, false);
    std::map<size_t, Bytes> blocks;  // by first unit
    const auto longest_run = [&] {
      size_t longest = 0;
      size_t run = 0;
      for (const bool unit : taken) longest = std::max(longest, run = unit ? 0 : run + 1);
      return longest;
    };
    for (int step = 0; step < 2000; ++step) {
      if (random.Chance(55)) {
        const auto size = static_cast<size_t>(random.Between(1, random.Chance(20) ? 6000 : 600));
        const size_t units = (size + 63) / 64;
        const absl::StatusOr<Bytes> block = arena->Allocate(size);
        ASSERT_EQ(block.ok(), longest_run() >= units) << block.status();
        if (!block.ok()) continue;
        const size_t first = *arena->region()->OffsetOf(block->span()) / 64;
        for (size_t unit = first; unit < first + units; ++unit) {
          ASSERT_FALSE(taken[unit]);
          taken[unit] = true;
        }
        blocks.emplace(first, *block);
      } else if (!blocks.empty()) {
        const auto victim =
            std::next(blocks.begin(), random.Between(0, static_cast<int64_t>(blocks.size()) - 1));
        const size_t units = (victim->second.size() + 63) / 64;
        for (size_t i = 0; i < units; ++i) taken[victim->first + i] = false;
        blocks.erase(victim);
      }
      ASSERT_EQ(arena->largest_free_bytes(), longest_run() * 64);
    }
    blocks.clear();
    EXPECT_EQ(arena->free_bytes(), kUnits * 64);
    EXPECT_EQ(arena->largest_free_bytes(), kUnits * 64);
  }
}

// Threads write their mark all over each block and find it there.
TEST(ArenaTest, ThreadsNeverShareABlock) {
  const auto arena = NewArena(1 << 18);
  std::vector<std::thread> threads;
  for (uint8_t mark = 1; mark <= 4; ++mark) {
    threads.emplace_back([&arena, mark] {
      Random random(mark);
      std::vector<Bytes> blocks;
      for (int step = 0; step < 3000; ++step) {
        absl::StatusOr<Bytes> block =
            arena->Allocate(static_cast<size_t>(random.Between(1, 20'000)));
        if (block.ok()) {
          std::memset(block->data(), mark, block->size());
          blocks.push_back(*std::move(block));
        }
        if (blocks.size() < 4 && block.ok()) continue;
        if (blocks.empty()) continue;
        const auto victim =
            static_cast<size_t>(random.Between(0, static_cast<int64_t>(blocks.size()) - 1));
        for (const std::byte byte : blocks[victim].span()) ASSERT_EQ(byte, std::byte{mark});
        std::swap(blocks[victim], blocks.back());
        blocks.pop_back();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(arena->free_bytes(), 1 << 18);
  EXPECT_EQ(arena->largest_free_bytes(), 1 << 18);
}

}  // namespace
}  // namespace structkv::client
