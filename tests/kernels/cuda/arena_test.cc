// The arena against a list of what is taken, through random sequences.
#include "kernels/cuda/arena.h"

#include <algorithm>
#include <random>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/random_tensor.h"

namespace structkv::cuda {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

// The model: taken ranges, sorted. Says where the arena must put a block.
class Model {
 public:
  explicit Model(int64_t bytes) : bytes_(bytes) {}

  // The offset of a block of `size`; -1: there is no room.
  int64_t Place(int64_t size) const {
    std::vector<std::pair<int64_t, int64_t>> gaps;  // begin, end
    int64_t begin = 0;
    for (const auto& [offset, taken] : taken_) {
      if (offset > begin) gaps.emplace_back(begin, offset);
      begin = offset + taken;
    }
    if (begin < bytes_) gaps.emplace_back(begin, bytes_);
    const bool large = size >= Arena::kLargeBytes;
    if (!large) std::reverse(gaps.begin(), gaps.end());
    for (const auto& [from, to] : gaps) {
      if (to - from >= size) return large ? from : to - size;
    }
    return -1;
  }
  void Take(int64_t offset, int64_t size) {
    taken_.emplace_back(offset, size);
    std::sort(taken_.begin(), taken_.end());
  }
  void GiveBack(int64_t offset) {
    const auto found = std::find_if(taken_.begin(), taken_.end(),
                                    [&](const auto& each) { return each.first == offset; });
    ASSERT_NE(found, taken_.end());
    taken_.erase(found);
  }
  int64_t free_bytes() const {
    int64_t free = bytes_;
    for (const auto& [offset, size] : taken_) free -= size;
    return free;
  }

 private:
  const int64_t bytes_;
  std::vector<std::pair<int64_t, int64_t>> taken_;
};

TEST(ArenaTest, SizesGoUpToAnEighthOfAPowerOfTwo) {
  for (const int64_t bytes : {int64_t{0}, int64_t{256}, int64_t{5000}, 31 * kMiB}) {
    const int64_t largest = LargestBlock(bytes);
    EXPECT_LE(largest, bytes);
    EXPECT_EQ(largest == 0 ? 0 : ArenaSize(largest), largest);
    EXPECT_GT(ArenaSize(largest + 1), bytes);
  }
  EXPECT_EQ(ArenaSize(0), 256);
  EXPECT_EQ(ArenaSize(1), 256);
  EXPECT_EQ(ArenaSize(257), 512);
  EXPECT_EQ(ArenaSize(2049), 2304);
  EXPECT_EQ(ArenaSize(16 * kMiB), 16 * kMiB);
  EXPECT_EQ(ArenaSize(16 * kMiB + 1), 18 * kMiB);
  EXPECT_EQ(ArenaSize(31 * kMiB), 32 * kMiB);
  std::mt19937_64 random = testing::Random(6000);
  for (int i = 0; i < 1000; ++i) {
    const auto bytes = static_cast<int64_t>(random() >> (random() % 40 + 20));
    const int64_t size = ArenaSize(bytes);
    EXPECT_GE(size, bytes);
    EXPECT_LE(size, std::max<int64_t>(bytes + 256, bytes + bytes / 8 + 1));
    EXPECT_EQ(size % 256, 0);
    EXPECT_EQ(ArenaSize(size), size);
  }
}

TEST(ArenaTest, BlocksLieWhereTheModelSays) {
  for (uint64_t round = 0; round < 40; ++round) {
    std::mt19937_64 random = testing::Random(6100 + round);
    const int64_t bytes = static_cast<int64_t>(random() % 400) * kMiB + 7;
    Arena arena(bytes);
    Model model(bytes / 256 * 256);
    std::vector<Arena::Block> blocks;
    for (int step = 0; step < 400; ++step) {
      if (!blocks.empty() && random() % 5 < 2) {
        const size_t which = random() % blocks.size();
        model.GiveBack(blocks[which].offset());
        std::swap(blocks[which], blocks.back());
        blocks.pop_back();
      } else {
        const auto wanted =
            static_cast<int64_t>(random() % (int64_t{1} << (random() % 27)));  // up to 64 MiB
        const int64_t place = model.Place(ArenaSize(wanted));
        std::optional<Arena::Block> block = arena.Take(wanted);
        ASSERT_EQ(block.has_value(), place >= 0);
        if (place >= 0) {
          ASSERT_EQ(block->offset(), place);
          ASSERT_EQ(block->bytes(), ArenaSize(wanted));
          model.Take(place, block->bytes());
          blocks.push_back(*std::move(block));
        }
      }
      ASSERT_EQ(arena.free_bytes(), model.free_bytes());
    }
    blocks.clear();
    EXPECT_EQ(arena.free_bytes(), arena.bytes());
    if (bytes >= 256) {
      // All of it is one gap again.
      int64_t most = arena.bytes();
      while (ArenaSize(most) > arena.bytes()) most -= 256;
      EXPECT_TRUE(arena.Take(most).has_value());
    }
  }
}

TEST(ArenaTest, HasNothingToGiveWhereItHasNothing) {
  Arena arena(255);
  EXPECT_EQ(arena.bytes(), 0);
  EXPECT_FALSE(arena.Take(0).has_value());
}

TEST(ArenaTest, ThreadsShareIt) {
  Arena arena(64 * kMiB);
  const auto work = [&arena](uint64_t number) {
    std::mt19937_64 random(number);
    std::vector<Arena::Block> blocks;
    for (int step = 0; step < 2000; ++step) {
      if (std::optional<Arena::Block> block = arena.Take(random() % kMiB)) {
        blocks.push_back(*std::move(block));
      }
      if (blocks.size() > 20) blocks.erase(blocks.begin(), blocks.begin() + 10);
    }
  };
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < 4; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(arena.free_bytes(), 64 * kMiB);
}

}  // namespace
}  // namespace structkv::cuda
