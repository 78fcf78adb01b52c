// The maps of kernels/cuda/fragments.h and the conversions of numbers.h and pieces.h.
#include "kernels/cuda/fragments.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <set>

#include "kernels/cuda/numbers.h"
#include "kernels/cuda/pieces.h"
#include "kernels/cuda/saliency_plan.h"
#include "kernels/reference/element.h"
#include "tests/kernels/fp8_codes.h"
#include "tests/kernels/random_tensor.h"

namespace structkv::cuda {
namespace {

// As the PTX ISA draws them for lanes 0, 6 and 31.
TEST(FragmentsTest, AreThoseOfThePtxIsa) {
  EXPECT_EQ(FragmentATokens(0, 0), 0);
  EXPECT_EQ(FragmentATokens(0, 1), 8);
  EXPECT_EQ(FragmentATokens(6, 2), 1);
  EXPECT_EQ(FragmentATokens(31, 3), 15);
  EXPECT_EQ(FragmentAElement(0, 0, 0), 0);
  EXPECT_EQ(FragmentAElement(0, 1, 1), 1);
  EXPECT_EQ(FragmentAElement(6, 0, 1), 5);
  EXPECT_EQ(FragmentAElement(6, 2, 0), 12);
  EXPECT_EQ(FragmentAElement(31, 3, 1), 15);
  EXPECT_EQ(FragmentBElement(6, 1, 0), 12);
  EXPECT_EQ(FragmentBRow(6), 1);
  EXPECT_EQ(FragmentBRow(31), 7);
  EXPECT_EQ(FragmentCToken(6, 0), 1);
  EXPECT_EQ(FragmentCToken(6, 3), 9);
  EXPECT_EQ(FragmentCRow(6, 2), 4);
  EXPECT_EQ(FragmentCRow(31, 1), 7);
}

TEST(FragmentsTest, HoldEveryElementOnce) {
  std::set<int> a;
  std::set<int> b;
  std::set<int> c;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int reg = 0; reg < 4; ++reg) {
      c.insert(FragmentCToken(lane, reg) * kTileRows + FragmentCRow(lane, reg));
      for (int half = 0; half < 2; ++half) {
        a.insert(FragmentATokens(lane, reg) * 16 + FragmentAElement(lane, reg, half));
        if (reg < 2) b.insert(FragmentBElement(lane, reg, half) * 8 + FragmentBRow(lane));
      }
    }
  }
  EXPECT_EQ(a.size(), 256U);
  EXPECT_EQ(b.size(), 128U);
  EXPECT_EQ(c.size(), 128U);
  EXPECT_EQ(*a.rbegin(), 255);
  EXPECT_EQ(*b.rbegin(), 127);
  EXPECT_EQ(*c.rbegin(), 127);
}

// What a lane loads is what its registers of both multiplications stand for, in A and in B.
TEST(FragmentsTest, PiecesAreTheLanesOwnElements) {
  std::set<int> dims;
  for (int pair = 0; pair < 3; ++pair) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int step = 0; step < 2; ++step) {
        for (int upper = 0; upper < 2; ++upper) {
          for (int half = 0; half < 2; ++half) {
            const int dim = PieceDim(pair, lane) + 2 * PieceWord(step, upper) + half;
            dims.insert(dim);
            EXPECT_EQ(dim, PermutedDim(pair, step, FragmentBElement(lane, upper, half)));
            EXPECT_EQ(dim, PermutedDim(pair, step, FragmentAElement(lane, 2 * upper, half)));
            EXPECT_EQ(dim, PermutedDim(pair, step, FragmentAElement(lane, 2 * upper + 1, half)));
          }
        }
      }
    }
  }
  EXPECT_EQ(dims.size(), 96U);
  EXPECT_EQ(*dims.rbegin(), 95);
}

void ExpectSame(double actual, double expected, uint32_t code) {
  if (std::isnan(expected)) {
    EXPECT_TRUE(std::isnan(actual)) << code;
  } else {
    EXPECT_EQ(actual, expected) << code;
  }
}

TEST(NumbersTest, ReadEveryCode) {
  for (uint32_t code = 0; code < 65536; ++code) {
    const auto bits = static_cast<uint16_t>(code);
    const double expected =
        reference::Element(reinterpret_cast<const std::byte*>(&bits), DType::kF16, 0);
    ExpectSame(HalfToFloat(code), expected, code);
    if (!std::isnan(expected)) {
      EXPECT_EQ(FloatToHalf(static_cast<float>(expected)), code);
    }
  }
  for (uint32_t code = 0; code < 256; ++code) {
    const auto byte = static_cast<uint8_t>(code);
    const double e4m3 = testing::DecodeFp8(byte, DType::kF8E4M3);
    const double e5m2 = testing::DecodeFp8(byte, DType::kF8E5M2);
    ExpectSame(E4M3ToFloat(code), e4m3, code);
    ExpectSame(E5M2ToFloat(code), e5m2, code);
    const uint32_t pair = code | 0x3000U;
    ExpectSame(HalfToFloat(Widened<DType::kF8E4M3, true>(pair) & 0xFFFFU), e4m3, code);
    ExpectSame(HalfToFloat(Widened<DType::kF8E5M2, true>(pair) & 0xFFFFU), e5m2, code);
    ExpectSame(FloatOf(Widened<DType::kF8E4M3, false>(pair) << 16), e4m3, code);
    ExpectSame(FloatOf(Widened<DType::kF8E5M2, false>(pair) << 16), e5m2, code);
    ExpectSame(FloatOf(Widened<DType::kF8E4M3, false>(code << 8) & 0xFFFF0000U), e4m3, code);
    ExpectSame(HalfToFloat(Widened<DType::kF8E5M2, true>(code << 8) >> 16), e5m2, code);
  }
}

TEST(NumbersTest, RoundToTheNearestHalf) {
  std::mt19937_64 random = testing::Random(1);
  for (int i = 0; i < 100000; ++i) {
    const float value = FloatOf(static_cast<uint32_t>(random()));
    if (std::isnan(value)) continue;
    EXPECT_EQ(FloatToHalf(value), testing::Encode(value, DType::kF16)) << value;
  }
}

TEST(NumbersTest, PartsSumToTheFloat) {
  std::mt19937_64 random = testing::Random(2);
  for (int i = 0; i < 100000; ++i) {
    const float value = FloatOf(static_cast<uint32_t>(random()));
    float parts[3];
    Split(value, parts);
    const float sum = parts[2] + parts[1] + parts[0];
    if (IsFinite(value)) {
      // The last part of the smallest floats is denormal, of which bfloat16 has steps of 2^-133.
      EXPECT_NEAR(sum, value, std::ldexp(1.0, -132));
      EXPECT_EQ(FloatBits(parts[1]) & 0xFFFFU, 0U);
      EXPECT_EQ(FloatBits(parts[2]) & 0xFFFFU, 0U);
    } else {
      EXPECT_FALSE(IsFinite(sum));
    }
  }
}

TEST(BadScoreTest, OrdersByTokenThenHead) {
  EXPECT_LT(BadScore(4, 127, kMinusInfinite), BadScore(5, 0, kNotANumber));
  EXPECT_LT(BadScore(5, 2, kInfinite), BadScore(5, 3, kNotANumber));
  EXPECT_LT(BadScore(int64_t{1} << 30, 127, kMinusInfinite), kNothingBad);
  const uint64_t flag = BadScore(1'000'000'007, 126, KindOf(-INFINITY));
  EXPECT_EQ(BadToken(flag), 1'000'000'007);
  EXPECT_EQ(BadHead(flag), 126);
  EXPECT_EQ(BadKindOf(flag), kMinusInfinite);
  EXPECT_EQ(KindOf(NAN), kNotANumber);
  EXPECT_EQ(KindOf(-NAN), kNotANumber);
  EXPECT_EQ(KindOf(INFINITY), kInfinite);
  EXPECT_EQ(BadRowIndex(BadRow(8191, kInfinite)), 8191);
  EXPECT_EQ(BadKindOf(BadRow(8191, kInfinite)), kInfinite);
}

}  // namespace
}  // namespace structkv::cuda
