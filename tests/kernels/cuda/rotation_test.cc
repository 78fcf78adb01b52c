// The kernel that moves keys to other positions, on the host or on a GPU (cuda_kernels.h), against
// the reference backend.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <list>
#include <memory>
#include <numeric>

#include "kernels/cuda/rotate_steps.h"
#include "kernels/reference/element.h"
#include "kernels/reference/reference_backend.h"
#include "tests/kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/gathered_rows.h"
#include "tests/kernels/rotation_bound.h"

namespace structkv::cuda {
namespace {

using testing::Frequencies;
using testing::GatheredRows;
using testing::GatherShape;

constexpr Layout kLayouts[] = {Layout::kHeadTokenDim, Layout::kTokenHeadDim};

// Keys that stood anywhere, moved.
class Moved {
 public:
  Moved(const GatherShape& shape, const RotationParams& rotation, double theta, double new_theta,
        std::mt19937_64& random)
      : rows_(shape, random),
        from_(Frequencies(rotation.pairs, theta)),
        to_(Frequencies(rotation.pairs, new_theta)),
        stood_(rows_.positions().size()),
        rotation_(rotation) {
    std::uniform_int_distribution<int32_t> far(0, 1 << 20);
    for (int32_t& position : stood_) position = far(random);
    // Some stay.
    stood_[0] = static_cast<int32_t>(rotation.first_position);
    rotation_.from = from_.data();
    rotation_.to = to_.data();
    rotation_.positions = stood_.data();
  }

  GatherRotatedJob job() { return {rows_.job(), rotation_}; }
  void Expect(const Backend& reference) { rows_.ExpectMoved(reference, rotation_); }
  GatheredRows& rows() { return rows_; }
  std::vector<int32_t>& stood() { return stood_; }

 private:
  GatheredRows rows_;
  std::vector<float> from_, to_;
  std::vector<int32_t> stood_;
  RotationParams rotation_;
};

class CudaRotationTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string why = testing::WhyNoCuda(); !why.empty()) GTEST_SKIP() << why;
  }

  void ExpectMoved(std::list<Moved>& all) {
    std::vector<GatherRotatedJob> jobs;
    for (Moved& moved : all) jobs.push_back(moved.job());
    testing::RunCudaGatherRotated(jobs);
    for (Moved& moved : all) {
      moved.Expect(*reference_);
      if (HasFatalFailure()) return;
    }
  }

  const std::unique_ptr<Backend> reference_ = reference::CreateReferenceBackend();
  std::mt19937_64 random_ = testing::Random(4800);
};

TEST_F(CudaRotationTest, AnglesAreThoseOfDoublePrecision) {
  std::uniform_real_distribution<double> exponent(-30, 33);
  for (int i = 0; i < 100000; ++i) {
    const double angle = std::exp2(exponent(random_)) * (i % 2 == 0 ? 1 : -1);
    const CosSin got = CosSinOf(angle);
    // A unit of the result in the last place, and half of one of the reduced angle.
    // 2^33 has a resolution of 2^-19 in double precision itself, of which nothing is lost.
    ASSERT_NEAR(got.cosine, std::cos(angle), 3 * std::ldexp(1.0, -25)) << angle;
    ASSERT_NEAR(got.sine, std::sin(angle), 3 * std::ldexp(1.0, -25)) << angle;
  }
  const CosSin none = CosSinOf(0.0);
  EXPECT_EQ(none.cosine, 1.0F);
  EXPECT_EQ(none.sine, 0.0F);
}

// New frequencies too: all that rope scaling comes to.
TEST_F(CudaRotationTest, MovesEveryTypeLayoutAndPart) {
  struct Part {
    int64_t dim, offset, pairs;
  };
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const RotaryPairing pairing : {RotaryPairing::kHalfSplit, RotaryPairing::kInterleaved}) {
      std::list<Moved> all;
      for (const Layout layout : kLayouts) {
        for (const Part& part : {Part{128, 0, 64}, Part{64, 0, 1}, Part{80, 0, 37}, Part{96, 7, 13},
                                 Part{576, 512, 32}, Part{576, 0, 288}, Part{40, 3, 0}}) {
          for (const bool per_head : {false, true}) {
            const GatherShape shape = {.dtype = dtype,
                                       .heads = 6,
                                       .dim = part.dim,
                                       .kept = 40,
                                       .per_head = per_head,
                                       .layout = layout,
                                       .to_layout = kLayouts[per_head ? 0 : 1]};
            const RotationParams rotation = {.pairing = pairing,
                                             .offset = part.offset,
                                             .pairs = part.pairs,
                                             .first_position = 5};
            all.emplace_back(shape, rotation, 10000, per_head ? 10000 : 37000, random_);
          }
        }
      }
      ExpectMoved(all);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CudaRotationTest, MovesBlocksAndWhateverTheAlignment) {
  std::list<Moved> all;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const RotationParams rotation = {.pairs = 32, .first_position = 100};
    for (const int64_t misalign : {1, 2, 4, 8}) {
      all.emplace_back(
          GatherShape{.dtype = dtype, .misalign = misalign, .to_misalign = 16 - misalign}, rotation,
          10000, 10000, random_);
    }
    for (const int64_t block_tokens : {1, 16, 24}) {
      for (const Layout layout : kLayouts) {
        all.emplace_back(GatherShape{.dtype = dtype,
                                     .per_head = layout == Layout::kHeadTokenDim,
                                     .layout = layout,
                                     .block_tokens = block_tokens,
                                     .to_layout = layout,
                                     .to_block_tokens = 16},
                         rotation, 10000, 10000, random_);
      }
    }
  }
  ExpectMoved(all);
}

// What stays where it is keeps its bytes, whatever they mean.
TEST_F(CudaRotationTest, CopiesAKeyThatDoesNotMove) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    Moved moved({.dtype = dtype}, {.pairs = 32, .first_position = 11}, 10000, 10000, random_);
    std::iota(moved.stood().begin(), moved.stood().end(), 11);
    for (int64_t j = 0; j < 90; ++j) {
      moved.rows().dense().Set(1, j, 0, std::numeric_limits<float>::quiet_NaN());
      moved.rows().dense().Set(1, j, 1, -0.0F);
      moved.rows().dense().Set(1, j, 2, std::numeric_limits<float>::infinity());
    }
    testing::RunCudaGatherRotated({moved.job()});
    moved.rows().Expect(*reference_);
  }
}

// Positions as far as int32 goes: products there are whole turns apart, and mean the same ones.
TEST_F(CudaRotationTest, MovesFromTheLastPositions) {
  Moved moved({.dtype = DType::kF32, .dim = 128, .kept = 70}, {.pairs = 64, .first_position = 5},
              10000, 10000, random_);
  for (size_t i = 0; i < moved.stood().size(); ++i) {
    moved.stood()[i] = std::numeric_limits<int32_t>::max() - static_cast<int32_t>(i * i);
  }
  testing::RunCudaGatherRotated({moved.job()});
  moved.Expect(*reference_);
}

// NaN and infinities stay what they are where they rotate; the largest numbers may overflow.
TEST_F(CudaRotationTest, RotatesTheEndsOfTheRange) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const float largest = dtype == DType::kF16 ? 65504.0F : 3e38F;
    const float numbers[] = {0.0F, -0.0F, 1e-8F, largest, -largest, 5e4F, -5e4F, 1e-40F, 1.0F};
    Moved moved({.dtype = dtype}, {.pairs = 32, .first_position = 5}, 10000, 10000, random_);
    size_t next = 0;
    for (int64_t j = 0; j < 90; ++j) {
      for (int64_t e = 0; e < 64; ++e) moved.rows().dense().Set(0, j, e, numbers[next++ % 9]);
      moved.rows().dense().Set(1, j, 3, std::numeric_limits<float>::quiet_NaN());
      moved.rows().dense().Set(2, j, 4, std::numeric_limits<float>::infinity());
    }
    moved.stood()[0] = 77;
    testing::RunCudaGatherRotated({moved.job()});
    const TensorView got = moved.rows().gathered();
    for (int64_t i = 0; i < got.tokens; ++i) {
      const auto element = [&](int64_t head, int64_t e) {
        return reference::Element(got.Row(head, i), dtype, e);
      };
      for (int64_t e = 0; e < 64; ++e) ASSERT_FALSE(std::isnan(element(0, e)));
      for (int64_t e = 0; e < 64; ++e) {
        ASSERT_EQ(std::isnan(element(1, e)), e % 32 == 3) << e;
        ASSERT_EQ(std::isfinite(element(2, e)), e % 32 != 4) << e;
      }
    }
  }
}

}  // namespace
}  // namespace structkv::cuda
