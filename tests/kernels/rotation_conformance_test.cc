// Every backend on keys that are gathered and moved to other positions, against the reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/reference/element.h"
#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/random_tensor.h"
#include "tests/kernels/rotation_bound.h"

namespace structkv {
namespace {

using testing::Frequencies;
using testing::UnitOf;

double Largest(DType dtype) {
  return dtype == DType::kF16 ? 65504 : std::numeric_limits<float>::max();
}

// What part of a key rotates.
struct Part {
  int64_t dim = 0;
  int64_t offset = 0;
  int64_t pairs = 0;
};

struct Case {
  DType dtype = DType::kF32;
  Layout layout = Layout::kHeadTokenDim;
  RotaryPairing pairing = RotaryPairing::kHalfSplit;
  Part part;
  bool per_head = false;

  std::string Text() const {
    return std::string(DTypeName(dtype)) + ", " + std::string(LayoutName(layout)) +
           (pairing == RotaryPairing::kHalfSplit ? ", half-split" : ", interleaved") + ", dim " +
           std::to_string(part.dim) + ", offset " + std::to_string(part.offset) + ", " +
           std::to_string(part.pairs) + " pairs" + (per_head ? ", per head" : "");
  }
};

// Keys, the rows that stay, and where they stood.
struct Keys {
  static constexpr int64_t kHeads = 2;
  static constexpr int64_t kCount = 90;
  static constexpr int64_t kKept = 70;  // more than one task has

  explicit Keys(const Case& c, uint64_t number = 0)
      : source(c.dtype, c.layout, kHeads, kCount, c.part.dim, /*misalign=*/3) {
    std::mt19937_64 random = testing::Random(static_cast<uint64_t>(c.part.dim) + number);
    source.Fill(random);
    std::uniform_int_distribution<int32_t> far(0, 1 << 20);
    for (int64_t h = 0; h < (c.per_head ? kHeads : 1); ++h) {
      std::vector<int32_t> all(kCount);
      std::iota(all.begin(), all.end(), 0);
      std::shuffle(all.begin(), all.end(), random);
      std::sort(all.begin(), all.begin() + kKept);
      rows.insert(rows.end(), all.begin(), all.begin() + kKept);
      std::vector<int32_t> stood(kKept);
      for (int32_t& position : stood) position = far(random);
      std::sort(stood.begin(), stood.end());
      positions.insert(positions.end(), stood.begin(), stood.end());
    }
  }

  testing::Tensor source;
  std::vector<int32_t> rows, positions;
};

double At(const TensorView& view, int64_t head, int64_t token, int64_t element) {
  return reference::Element(view.Row(head, token), view.dtype, element);
}

class RotationTest : public ::testing::TestWithParam<std::string> {
 protected:
  // Gathers into a tensor that is misaligned likewise.
  testing::Tensor Run(const Backend& backend, const Case& c, const Keys& keys,
                      const std::vector<float>& from, const std::vector<float>& to,
                      ParallelFor parallel, int64_t first_position = 5) const {
    testing::Tensor out(c.dtype, c.layout, Keys::kHeads, Keys::kKept, c.part.dim, /*misalign=*/1);
    EXPECT_EQ(backend.GatherRotated(keys.source.view(), keys.rows.data(), c.per_head,
                                    {.pairing = c.pairing,
                                     .offset = c.part.offset,
                                     .pairs = c.part.pairs,
                                     .from = from.data(),
                                     .to = to.data(),
                                     .positions = keys.positions.data(),
                                     .first_position = first_position},
                                    out.mutable_view(), parallel),
              absl::OkStatus());
    return out;
  }

  void ExpectClose(const Case& c, const TensorView& got, const TensorView& want) const {
    testing::ExpectRotated({.pairing = c.pairing, .offset = c.part.offset, .pairs = c.part.pairs},
                           got, want, c.Text());
  }

  const std::unique_ptr<Backend> backend_ = testing::MakeBackend(GetParam());
  const std::unique_ptr<Backend> reference_ = testing::MakeBackend("reference");
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const Layout layout : {Layout::kHeadTokenDim, Layout::kTokenHeadDim}) {
      for (const RotaryPairing pairing : {RotaryPairing::kHalfSplit, RotaryPairing::kInterleaved}) {
        for (const Part& part :
             {Part{32, 0, 16}, Part{128, 0, 64}, Part{64, 0, 1}, Part{80, 0, 37}, Part{96, 7, 13},
              Part{256, 0, 32}, Part{576, 512, 32}, Part{576, 0, 288}}) {
          for (const bool per_head : {false, true}) {
            cases.push_back({dtype, layout, pairing, part, per_head});
          }
        }
      }
    }
  }
  return cases;
}

TEST_P(RotationTest, AgreesWithTheReference) {
  for (const Case& c : Cases()) {
    const Keys keys(c);
    const std::vector<float> from = Frequencies(c.part.pairs, 10000);
    const std::vector<float> to = Frequencies(c.part.pairs, 37000);
    for (const std::vector<float>* after : {&from, &to}) {
      const testing::Tensor got =
          Run(*backend_, c, keys, from, *after, testing::BackwardsOnThreads);
      const testing::Tensor want = Run(*reference_, c, keys, from, *after, SerialFor);
      ExpectClose(c, got.view(), want.view());
      if (HasFatalFailure()) return;
      const testing::Tensor again = Run(*backend_, c, keys, from, *after, SerialFor);
      ASSERT_EQ(std::memcmp(got.view().data, again.view().data,
                            Keys::kHeads * Keys::kKept * c.part.dim * DTypeSize(c.dtype)),
                0)
          << c.Text() << ": the order of the tasks shows";
    }
  }
}

// Positions as far as int32 goes: there float32 products lie whole turns apart, but all backends
// mean the same ones.
TEST_P(RotationTest, AgreesWithTheReferenceAtTheLastPositions) {
  const Case c{DType::kF32, Layout::kHeadTokenDim, RotaryPairing::kHalfSplit, {128, 0, 64}, false};
  Keys keys(c);
  for (int64_t i = 0; i < Keys::kKept; ++i) {
    keys.positions[i] = std::numeric_limits<int32_t>::max() - static_cast<int32_t>(i * i);
  }
  const std::vector<float> from = Frequencies(c.part.pairs, 10000);
  const testing::Tensor got = Run(*backend_, c, keys, from, from, testing::BackwardsOnThreads);
  const testing::Tensor want = Run(*reference_, c, keys, from, from, SerialFor);
  for (int64_t h = 0; h < Keys::kHeads; ++h) {
    for (int64_t i = 0; i < Keys::kKept; ++i) {
      for (int64_t e = 0; e < c.part.dim; ++e) {
        // 1.4e9 quarter turns times a constant of 33 bits are rounded to 2^-22.
        ASSERT_NEAR(At(got.view(), h, i, e), At(want.view(), h, i, e), 1e-5) << i << ", " << e;
      }
    }
  }
}

// Blocks on both sides, in any order on the way in.
TEST_P(RotationTest, MovesKeysInBlocks) {
  const Case c{DType::kBF16, Layout::kTokenHeadDim, RotaryPairing::kHalfSplit, {64, 0, 32}, true};
  constexpr int64_t kBlock = 16;
  constexpr int64_t kBlocks = (Keys::kCount + kBlock - 1) / kBlock;
  constexpr int64_t kOutBlocks = (Keys::kKept + kBlock - 1) / kBlock;
  const Keys keys(c);
  std::vector<int32_t> table(kBlocks);
  for (int64_t b = 0; b < kBlocks; ++b) table[b] = static_cast<int32_t>((b * 5 + 2) % kBlocks);
  testing::Tensor pool(c.dtype, c.layout, Keys::kHeads, kBlocks * kBlock, c.part.dim);
  const TensorView blocks = TensorView::Paged(pool.view().data, c.dtype, c.layout, Keys::kHeads,
                                              Keys::kCount, c.part.dim, table.data(), kBlock);
  const size_t row_bytes = static_cast<size_t>(c.part.dim) * DTypeSize(c.dtype);
  for (int64_t h = 0; h < Keys::kHeads; ++h) {
    for (int64_t j = 0; j < Keys::kCount; ++j) {
      std::memcpy(const_cast<std::byte*>(blocks.Row(h, j)), keys.source.view().Row(h, j),
                  row_bytes);
    }
  }
  const std::vector<float> from = Frequencies(c.part.pairs, 10000);
  const testing::Tensor want = Run(*backend_, c, keys, from, from, SerialFor);
  testing::Tensor out(c.dtype, c.layout, Keys::kHeads, kOutBlocks * kBlock, c.part.dim);
  const auto paged = MutableTensorView::Paged(out.mutable_view().data, c.dtype, c.layout,
                                              Keys::kHeads, Keys::kKept, c.part.dim, kBlock);
  EXPECT_EQ(backend_->GatherRotated(blocks, keys.rows.data(), c.per_head,
                                    {.pairing = c.pairing,
                                     .pairs = c.part.pairs,
                                     .from = from.data(),
                                     .to = from.data(),
                                     .positions = keys.positions.data(),
                                     .first_position = 5},
                                    paged, testing::BackwardsOnThreads),
            absl::OkStatus());
  for (int64_t h = 0; h < Keys::kHeads; ++h) {
    for (int64_t i = 0; i < Keys::kKept; ++i) {
      ASSERT_EQ(std::memcmp(paged.Row(h, i), want.view().Row(h, i), row_bytes), 0)
          << h << ", " << i;
    }
  }
}

// What stays where it is keeps its bytes, whatever they mean.
TEST_P(RotationTest, CopiesAKeyThatDoesNotMove) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const Case c{dtype, Layout::kTokenHeadDim, RotaryPairing::kInterleaved, {64, 0, 32}, false};
    Keys keys(c);
    std::iota(keys.positions.begin(), keys.positions.end(), 11);
    for (int64_t j = 0; j < Keys::kCount; ++j) {
      keys.source.Set(1, j, 0, std::numeric_limits<float>::quiet_NaN());
      keys.source.Set(1, j, 1, -0.0F);
      keys.source.Set(1, j, 2, std::numeric_limits<float>::infinity());
    }
    const std::vector<float> from = Frequencies(c.part.pairs, 10000);
    const testing::Tensor got =
        Run(*backend_, c, keys, from, from, testing::BackwardsOnThreads, /*first_position=*/11);
    for (int64_t h = 0; h < Keys::kHeads; ++h) {
      for (int64_t i = 0; i < Keys::kKept; ++i) {
        ASSERT_EQ(std::memcmp(got.view().Row(h, i), keys.source.view().Row(h, keys.rows[i]),
                              c.part.dim * DTypeSize(dtype)),
                  0);
      }
    }
  }
}

// Numbers at the ends of the types' ranges, in a vector's body and in what is left of it.
TEST_P(RotationTest, RoundsTheEndsOfTheRange) {
  const std::vector<float> numbers = {0.0F,    -0.0F,     1e-8F,    6e-8F,     -3e-7F,   5.96e-8F,
                                      6.1e-5F, -6.09e-5F, 65504.0F, -65504.0F, 46000.0F, 3e38F,
                                      -3e38F,  1e-40F,    1.0F,     2.0F,      -1.0009F, 1023.5F};
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const RotaryPairing pairing : {RotaryPairing::kHalfSplit, RotaryPairing::kInterleaved}) {
      const Case c{dtype, Layout::kHeadTokenDim, pairing, {80, 0, 37}, false};
      Keys keys(c);
      size_t next = 0;
      for (int64_t j = 0; j < Keys::kCount; ++j) {
        for (int64_t e = 0; e < c.part.dim; ++e) {
          keys.source.Set(0, j, e, numbers[next++ % numbers.size()]);
        }
        keys.source.Set(1, j, 0, std::numeric_limits<float>::quiet_NaN());
        keys.source.Set(1, j, 4, std::numeric_limits<float>::infinity());
      }
      const std::vector<float> from = Frequencies(c.part.pairs, 10000);
      const testing::Tensor got = Run(*backend_, c, keys, from, from, SerialFor);
      const testing::Tensor want = Run(*reference_, c, keys, from, from, SerialFor);
      for (int64_t h = 0; h < 2; ++h) {
        for (int64_t i = 0; i < Keys::kKept; ++i) {
          for (int64_t j = 0; j < c.part.pairs; ++j) {
            const bool halves = pairing == RotaryPairing::kHalfSplit;
            const int64_t first = halves ? j : 2 * j;
            const int64_t second = first + (halves ? c.part.pairs : 1);
            const TensorView& source = keys.source.view();
            const double norm =
                std::hypot(At(source, h, keys.rows[i], first), At(source, h, keys.rows[i], second));
            for (const int64_t e : {first, second}) {
              const double g = At(got.view(), h, i, e);
              const double w = At(want.view(), h, i, e);
              const std::string where =
                  c.Text() + ", row " + std::to_string(i) + ", element " + std::to_string(e);
              if (!std::isfinite(w)) {
                // At the very end one may have rounded to infinity, the other to the last number.
                ASSERT_TRUE(!std::isfinite(g) || std::fabs(g) > 0.99 * Largest(dtype))
                    << where << ": " << g;
                ASSERT_EQ(std::isnan(g), std::isnan(w)) << where;
                continue;
              }
              const double step = dtype == DType::kF16 ? std::ldexp(1.0, -24) : 0;
              ASSERT_NEAR(g, w,
                          2 * UnitOf(dtype) * std::fabs(w) + 8 * UnitOf(DType::kF32) * norm + step +
                              std::ldexp(1.0, -133))
                  << where;
            }
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, RotationTest, ::testing::ValuesIn(testing::BackendsUnderTest()),
                         [](const auto& instance) { return instance.param; });

}  // namespace
}  // namespace structkv
