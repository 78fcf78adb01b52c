#include "service/session/piece_map.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>

namespace structkv::session {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int64_t kTensor = 100;
constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
constexpr int64_t kMin = std::numeric_limits<int64_t>::min();

class PieceMapTest : public ::testing::Test {
 protected:
  bool IsNew(int64_t offset, int64_t size) const {
    const auto found = map_.Find(kTensor, offset, size, "layer 3, keys");
    return found.ok() && !found->has_value();
  }
  std::string Refusal(int64_t offset, int64_t size) const {
    const auto found = map_.Find(kTensor, offset, size, "layer 3, keys");
    if (found.ok()) return "taken";
    EXPECT_EQ(found.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(found.status().message()), ::testing::StartsWith("layer 3, keys: "));
    return std::string(found.status().message());
  }
  PieceMap map_;
};

TEST_F(PieceMapTest, FillsATensor) {
  EXPECT_TRUE(IsNew(0, kTensor));
  for (const int64_t offset : {50, 0, 75, 25}) {
    EXPECT_TRUE(IsNew(offset, 25));
    map_.Add(offset, 25, {1});
  }
  EXPECT_EQ(map_.bytes(), kTensor);
}

TEST_F(PieceMapTest, KnowsAPieceAgainByItsPlaceAndSize) {
  map_.Add(10, 20, {0xabc, true});
  map_.Add(30, 5, {0xdef, false});
  const auto first = map_.Find(kTensor, 10, 20, "");
  ASSERT_TRUE(first.ok());
  EXPECT_TRUE(first->value() == (PieceDigest{0xabc, true}));
  EXPECT_TRUE(map_.Find(kTensor, 30, 5, "")->value() == (PieceDigest{0xdef, false}));
  EXPECT_EQ(map_.bytes(), 25);
}

TEST_F(PieceMapTest, RefusesAnyOverlap) {
  map_.Add(10, 20, {1});
  map_.Add(50, 10, {2});
  // From below, from above, within, around, over both, the same place in another size.
  EXPECT_THAT(Refusal(5, 6),
              AllOf(HasSubstr("6 bytes at offset_bytes 5"), HasSubstr("20 bytes at 10")));
  EXPECT_THAT(Refusal(29, 5), HasSubstr("20 bytes at 10"));
  EXPECT_THAT(Refusal(12, 3), HasSubstr("20 bytes at 10"));
  EXPECT_THAT(Refusal(0, 31), HasSubstr("20 bytes at 10"));
  EXPECT_THAT(Refusal(30, 21), HasSubstr("10 bytes at 50"));
  EXPECT_THAT(Refusal(0, kTensor), HasSubstr("overlaps"));
  EXPECT_THAT(Refusal(10, 19), HasSubstr("20 bytes at 10"));
  EXPECT_THAT(Refusal(10, 21), HasSubstr("20 bytes at 10"));
  EXPECT_TRUE(IsNew(0, 10));
  EXPECT_TRUE(IsNew(30, 20));
  EXPECT_TRUE(IsNew(60, 40));
}

TEST_F(PieceMapTest, RefusesWhatLeavesTheTensor) {
  EXPECT_THAT(Refusal(0, 101), AllOf(HasSubstr("101 bytes"), HasSubstr("has 100 bytes")));
  EXPECT_THAT(Refusal(100, 1), HasSubstr("leaves the tensor"));
  EXPECT_THAT(Refusal(-1, 1), HasSubstr("leaves the tensor"));
  EXPECT_THAT(Refusal(kMax, 1), HasSubstr("leaves the tensor"));
  EXPECT_THAT(Refusal(kMax, kMax), HasSubstr("leaves the tensor"));
  EXPECT_THAT(Refusal(kMin, kMax), HasSubstr("leaves the tensor"));
  EXPECT_THAT(Refusal(1, kMax), HasSubstr("leaves the tensor"));
}

TEST_F(PieceMapTest, RefusesNothingAsAPiece) {
  EXPECT_THAT(Refusal(7, 0), AllOf(HasSubstr("empty"), HasSubstr("offset_bytes 7")));
  EXPECT_THAT(Refusal(0, -1), HasSubstr("empty"));
}

TEST(PieceMapLimitTest, ATensorComesInSoManyPiecesAtMost) {
  EXPECT_EQ(PieceMap::MaxPieces(100), 1024);
  EXPECT_EQ(PieceMap::MaxPieces(int64_t{1} << 20), 1024 + 64);
  constexpr int64_t kBytes = 4096;
  PieceMap map;
  for (int64_t i = 0; i < PieceMap::MaxPieces(kBytes); ++i) {
    const auto found = map.Find(kBytes, 2 * i, 1, "t");
    ASSERT_TRUE(found.ok()) << found.status();
    map.Add(2 * i, 1, {static_cast<uint64_t>(i)});
  }
  const auto one_more = map.Find(kBytes, 3000, 1000, "t");
  EXPECT_EQ(one_more.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(one_more.status().message()),
              AllOf(HasSubstr("one too many"), HasSubstr("1024 pieces")));
  EXPECT_TRUE(map.Find(kBytes, 2, 1, "t")->has_value());  // again is not one more
}

}  // namespace
}  // namespace structkv::session
