// The kernels that copy rows and move keys, on the host or on a GPU (cuda_kernels.h), against the
// reference backend.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <list>
#include <memory>
#include <numeric>
#include <optional>
#include <string>

#include "kernels/cuda/rotate_steps.h"
#include "kernels/reference/element.h"
#include "kernels/reference/reference_backend.h"
#include "tests/kernels/cuda/cuda_kernels.h"
#include "tests/kernels/paged_tensor.h"
#include "tests/kernels/random_tensor.h"
#include "tests/kernels/rotation_bound.h"

namespace structkv::cuda {
namespace {

using testing::ExpectRotated;
using testing::Frequencies;

constexpr Layout kLayouts[] = {Layout::kHeadTokenDim, Layout::kTokenHeadDim};
constexpr std::byte kUntouched{0x5A};

// A tensor, the rows of it that are kept, and where they go.
struct Shape {
  DType dtype = DType::kBF16;
  int64_t heads = 3;
  int64_t tokens = 90;
  int64_t dim = 64;
  int64_t kept = 37;
  bool per_head = false;
  Layout layout = Layout::kHeadTokenDim;
  int64_t block_tokens = 0;  // 0: dense
  Layout to_layout = Layout::kHeadTokenDim;
  int64_t to_block_tokens = 0;
  // Bytes beyond a boundary of 16, of dense sources and of the destination.
  int64_t misalign = 0;
  int64_t to_misalign = 0;
  int64_t row_dim = 0;  // elements that a row has in the source; 0: dim

  std::string Text() const {
    return std::string(DTypeName(dtype)) + ", " + std::to_string(heads) + " heads, " +
           std::to_string(kept) + " of " + std::to_string(tokens) + ", dim " + std::to_string(dim) +
           (per_head ? ", per head, " : ", ") + std::string(LayoutName(layout)) + " in blocks of " +
           std::to_string(block_tokens) + " + " + std::to_string(misalign) + " to " +
           std::string(LayoutName(to_layout)) + " in blocks of " + std::to_string(to_block_tokens) +
           " + " + std::to_string(to_misalign);
  }
};

// Rows of a shape that a kernel and the reference copy.
class Rows {
 public:
  Rows(const Shape& shape, std::mt19937_64& random)
      : shape_(shape),
        dense_(shape.dtype, shape.layout, shape.heads, shape.tokens,
               shape.row_dim != 0 ? shape.row_dim : shape.dim, shape.misalign) {
    dense_.Fill(random);
    if (shape.block_tokens != 0) {
      paged_.emplace(dense_.view(), shape.layout, shape.block_tokens, random);
    }
    std::vector<int32_t> all(static_cast<size_t>(shape.tokens));
    for (int64_t h = 0; h < (shape.per_head ? shape.heads : 1); ++h) {
      std::iota(all.begin(), all.end(), 0);
      std::shuffle(all.begin(), all.end(), random);
      std::sort(all.begin(), all.begin() + shape.kept);
      positions_.insert(positions_.end(), all.begin(), all.begin() + shape.kept);
    }
    const int64_t block = shape.to_block_tokens;
    const int64_t room = block == 0 ? shape.kept : (shape.kept + block - 1) / block * block;
    const int64_t bytes =
        room * shape.heads * shape.dim * static_cast<int64_t>(DTypeSize(shape.dtype));
    got_.assign(static_cast<size_t>(shape.to_misalign + bytes + kGuardBytes), kUntouched);
    want_ = got_;
  }

  GatherJob job() { return {source(), positions_.data(), shape_.per_head, To(got_)}; }
  TensorView source() const {
    TensorView view = paged_ ? paged_->view() : dense_.view();
    view.dim = shape_.dim;
    return view;
  }
  const std::vector<int32_t>& positions() const { return positions_; }
  testing::Tensor& dense() { return dense_; }

  void Expect(const Backend& reference) {
    reference.Gather(source(), positions_.data(), shape_.per_head, To(want_), SerialFor);
    EXPECT_TRUE(got_ == want_) << shape_.Text();
  }

  void ExpectMoved(const Backend& reference, const RotationParams& rotation) {
    reference.GatherRotated(source(), positions_.data(), shape_.per_head, rotation, To(want_),
                            SerialFor);
    ExpectRotated(rotation, View(got_), View(want_), shape_.Text());
    // And nothing around the rows was written.
    const MutableTensorView got = To(got_);
    const MutableTensorView want = To(want_);
    const size_t row_bytes = static_cast<size_t>(shape_.dim) * DTypeSize(shape_.dtype);
    for (int64_t h = 0; h < shape_.heads; ++h) {
      for (int64_t i = 0; i < shape_.kept; ++i) {
        std::memcpy(got.Row(h, i), want.Row(h, i), row_bytes);
      }
    }
    EXPECT_TRUE(got_ == want_) << shape_.Text();
  }

  // The moved rows.
  TensorView moved() { return View(got_); }

 private:
  static constexpr int64_t kGuardBytes = 48;

  MutableTensorView To(std::vector<std::byte>& bytes) const {
    std::byte* const data = bytes.data() + shape_.to_misalign;
    return shape_.to_block_tokens == 0
               ? MutableTensorView::Dense(data, shape_.dtype, shape_.to_layout, shape_.heads,
                                          shape_.kept, shape_.dim)
               : MutableTensorView::Paged(data, shape_.dtype, shape_.to_layout, shape_.heads,
                                          shape_.kept, shape_.dim, shape_.to_block_tokens);
  }
  TensorView View(std::vector<std::byte>& bytes) const {
    const MutableTensorView v = To(bytes);
    return {v.data,        v.dtype,        v.heads, v.tokens,       v.dim,
            v.head_stride, v.token_stride, nullptr, v.block_tokens, v.block_stride};
  }

  const Shape shape_;
  testing::Tensor dense_;
  std::optional<testing::PagedTensor> paged_;
  std::vector<int32_t> positions_;
  std::vector<std::byte> got_, want_;
};

class CudaGatherTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string why = testing::WhyNoCuda(); !why.empty()) GTEST_SKIP() << why;
  }

  // All in one call.
  void ExpectCopied(const std::vector<Shape>& shapes) {
    std::list<Rows> all;
    std::vector<GatherJob> jobs;
    for (const Shape& shape : shapes) jobs.push_back(all.emplace_back(shape, random_).job());
    testing::RunCudaGather(jobs);
    for (Rows& rows : all) rows.Expect(*reference_);
  }

  const std::unique_ptr<Backend> reference_ = reference::CreateReferenceBackend();
  std::mt19937_64 random_ = testing::Random(4700);
};

TEST_F(CudaGatherTest, CopiesEveryTypeLayoutAndBlock) {
  for (const DType dtype :
       {DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3, DType::kF8E5M2}) {
    std::vector<Shape> shapes;
    for (const Layout layout : kLayouts) {
      for (const Layout to_layout : kLayouts) {
        for (const int64_t block_tokens : {0, 1, 16, 24}) {
          for (const int64_t to_block_tokens : {0, 7, 16}) {
            for (const bool per_head : {false, true}) {
              shapes.push_back({.dtype = dtype,
                                .per_head = per_head,
                                .layout = layout,
                                .block_tokens = block_tokens,
                                .to_layout = to_layout,
                                .to_block_tokens = to_block_tokens});
            }
          }
        }
      }
    }
    ExpectCopied(shapes);
  }
}

TEST_F(CudaGatherTest, CopiesWhateverTheAlignment) {
  std::vector<Shape> shapes;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF8E4M3}) {
    for (const int64_t misalign : {0, 1, 2, 4, 8}) {
      for (const int64_t to_misalign : {0, 3, 6, 8}) {
        shapes.push_back({.dtype = dtype,
                          .heads = 2,
                          .tokens = 40,
                          .kept = 21,
                          .per_head = true,
                          .misalign = misalign,
                          .to_misalign = to_misalign});
      }
    }
  }
  ExpectCopied(shapes);
}

// One row, all of them, rows longer than a tile and shorter than a load, and many heads in one row.
TEST_F(CudaGatherTest, CopiesAnyNumberOfRowsOfAnyLength) {
  ExpectCopied({{.tokens = 1, .kept = 1},
                {.kept = 90},
                {.heads = 1, .tokens = 1000, .dim = 1, .kept = 999},
                {.heads = 1, .tokens = 5, .dim = 20000, .kept = 3},
                {.heads = 200,
                 .tokens = 5,
                 .dim = 128,
                 .kept = 3,
                 .layout = Layout::kTokenHeadDim,
                 .to_layout = Layout::kTokenHeadDim},
                {.dtype = DType::kF8E4M3, .tokens = 600, .dim = 40, .kept = 500},
                {.tokens = 300, .dim = 128, .kept = 257, .per_head = true}});
}

// Values that are the first elements of latent keys.
TEST_F(CudaGatherTest, CopiesAPartOfEachRow) {
  std::vector<Shape> shapes;
  for (const int64_t block_tokens : {0, 16}) {
    shapes.push_back({.heads = 1,
                      .dim = 512,
                      .block_tokens = block_tokens,
                      .to_block_tokens = 2 * block_tokens,
                      .row_dim = 576});
  }
  ExpectCopied(shapes);
}

// Two decode ranks' heads of one prefill rank's tensor: jobs that read parts of it.
TEST_F(CudaGatherTest, CopiesHeadsToWhereEachRankWantsThem) {
  testing::Tensor source(DType::kBF16, Layout::kHeadTokenDim, 4, 50, 64);
  source.Fill(random_);
  const std::vector<int32_t> positions = {0, 7, 8, 30, 49};
  std::vector<uint16_t> ranks[2];
  std::vector<GatherJob> jobs;
  for (int64_t rank = 0; rank < 2; ++rank) {
    ranks[rank].resize(2 * 5 * 64);
    TensorView part = source.view();
    part.data = part.Row(2 * rank, 0);
    part.heads = 2;
    jobs.push_back({part, positions.data(), false,
                    MutableTensorView::Dense(ranks[rank].data(), DType::kBF16,
                                             Layout::kTokenHeadDim, 2, 5, 64)});
  }
  testing::RunCudaGather(jobs);
  for (int64_t h = 0; h < 4; ++h) {
    for (int64_t i = 0; i < 5; ++i) {
      EXPECT_EQ(std::memcmp(&ranks[h / 2][static_cast<size_t>((i * 2 + h % 2) * 64)],
                            source.view().Row(h, positions[static_cast<size_t>(i)]), 128),
                0);
    }
  }
}

TEST_F(CudaGatherTest, PassesOverJobsThatKeepNothing) {
  ExpectCopied({{.kept = 0}, {.kept = 3}, {.kept = 0}});
  ExpectCopied({{.kept = 0}});
  testing::RunCudaGather({});
}

TEST_F(CudaGatherTest, WidthIsWhatAlignmentLets) {
  alignas(16) std::byte data[64];
  const int32_t position = 0;
  const auto width = [&](DType dtype, int64_t dim, int64_t from, int64_t to) {
    const GatherJob job = {
        TensorView::Dense(data + from, dtype, Layout::kHeadTokenDim, 2, 5, dim), &position, false,
        MutableTensorView::Dense(data + to, dtype, Layout::kHeadTokenDim, 2, 1, dim)};
    return PlanOf(job).width;
  };
  EXPECT_EQ(width(DType::kBF16, 128, 0, 0), 16);
  EXPECT_EQ(width(DType::kBF16, 128, 8, 0), 8);
  EXPECT_EQ(width(DType::kBF16, 128, 0, 12), 4);
  EXPECT_EQ(width(DType::kBF16, 128, 2, 16), 2);
  EXPECT_EQ(width(DType::kF32, 128, 0, 3), 1);
  EXPECT_EQ(width(DType::kBF16, 36, 0, 0), 8);
  EXPECT_EQ(width(DType::kF8E4M3, 36, 0, 0), 4);
  EXPECT_EQ(width(DType::kF8E4M3, 33, 0, 0), 1);
}

TEST_F(CudaGatherTest, RefusesWhatNoKernelTakes) {
  std::byte data[64];
  const int32_t position = 0;
  const float frequency = 1;
  const auto of = [&](DType dtype, int64_t dim) {
    return GatherJob{TensorView::Dense(data, dtype, Layout::kHeadTokenDim, 1, 1, dim), &position,
                     false,
                     MutableTensorView::Dense(data, dtype, Layout::kHeadTokenDim, 1, 1, dim)};
  };
  const GatherJob good = of(DType::kF32, 8);
  EXPECT_TRUE(IsValid(good));
  GatherJob job = good;
  job.positions = nullptr;
  EXPECT_FALSE(IsValid(job));
  job.destination.tokens = 0;
  EXPECT_TRUE(IsValid(job));
  job = good;
  job.destination.dtype = DType::kBF16;
  EXPECT_FALSE(IsValid(job));
  job = good;
  job.destination.heads = 2;
  EXPECT_FALSE(IsValid(job));
  job = good;
  job.source.tokens = int64_t{1} << 31;
  EXPECT_FALSE(IsValid(job));
  job = good;
  job.source.block_tokens = -1;
  EXPECT_FALSE(IsValid(job));

  const RotationParams rotation = {
      .offset = 4, .pairs = 2, .from = &frequency, .to = &frequency, .positions = &position};
  EXPECT_TRUE(IsValid(GatherRotatedJob{good, rotation}));
  EXPECT_FALSE(IsValid(GatherRotatedJob{of(DType::kF8E4M3, 8), rotation}));
  EXPECT_TRUE(IsValid(GatherRotatedJob{of(DType::kF32, kStageBytes / 4), rotation}));
  EXPECT_FALSE(IsValid(GatherRotatedJob{of(DType::kF32, kStageBytes / 4 + 8), rotation}));
  RotationParams other = rotation;
  other.pairs = 3;
  EXPECT_FALSE(IsValid(GatherRotatedJob{good, other}));
  other = rotation;
  other.positions = nullptr;
  EXPECT_FALSE(IsValid(GatherRotatedJob{good, other}));
  other = rotation;
  other.to = nullptr;
  EXPECT_FALSE(IsValid(GatherRotatedJob{good, other}));
}

TEST_F(CudaGatherTest, LaunchesTakeWhatFits) {
  std::byte data[64];
  const int32_t position = 0;
  // A tile a row.
  const auto of = [&](int64_t kept) {
    GatherJob job = {
        TensorView::Dense(data, DType::kF32, Layout::kHeadTokenDim, 1, 10, 1 << 20), &position,
        false,
        MutableTensorView::Dense(data, DType::kF32, Layout::kHeadTokenDim, 1, kept, 1 << 20)};
    return job;
  };
  const auto launch = std::make_unique<CopyLaunch>();
  const std::vector<GatherJob> many(CopyLaunch::kJobs + 5, of(2));
  EXPECT_EQ(FillLaunch(many.data(), CopyLaunch::kJobs + 5, launch.get()), CopyLaunch::kJobs);
  EXPECT_EQ(launch->tiles, 2 * CopyLaunch::kJobs);
  EXPECT_EQ(launch->job[3].first_tile, 6);
  const std::vector<GatherJob> large = {of(0), of(kMaxTiles - 1), of(1), of(1)};
  EXPECT_EQ(FillLaunch(large.data(), 4, launch.get()), 3);
  EXPECT_EQ(launch->tiles, kMaxTiles);
  EXPECT_EQ(FillLaunch(large.data() + 3, 1, launch.get()), 1);
  EXPECT_EQ(launch->tiles, 1);
}

// --- Rotation ---

TEST_F(CudaGatherTest, AnglesAreThoseOfDoublePrecision) {
  std::uniform_real_distribution<double> exponent(-30, 33);
  for (int i = 0; i < 100000; ++i) {
    const double angle = std::exp2(exponent(random_)) * (i % 2 == 0 ? 1 : -1);
    const CosSin got = CosSinOf(angle);
    // 2^33 has a resolution of 2^-19 in double precision itself, of which nothing is lost.
    ASSERT_NEAR(got.cosine, std::cos(angle), 3 * std::ldexp(1.0, -25)) << angle;
    ASSERT_NEAR(got.sine, std::sin(angle), 3 * std::ldexp(1.0, -25)) << angle;
  }
  const CosSin none = CosSinOf(0.0);
  EXPECT_EQ(none.cosine, 1.0F);
  EXPECT_EQ(none.sine, 0.0F);
}

// Keys that stood anywhere, moved.
class Moved {
 public:
  Moved(const Shape& shape, const RotationParams& rotation, double theta, double new_theta,
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
  Rows& rows() { return rows_; }
  std::vector<int32_t>& stood() { return stood_; }

 private:
  Rows rows_;
  std::vector<float> from_, to_;
  std::vector<int32_t> stood_;
  RotationParams rotation_;
};

class CudaRotationTest : public CudaGatherTest {
 protected:
  void ExpectMoved(std::list<Moved>& all) {
    std::vector<GatherRotatedJob> jobs;
    for (Moved& moved : all) jobs.push_back(moved.job());
    testing::RunCudaGatherRotated(jobs);
    for (Moved& moved : all) {
      moved.Expect(*reference_);
      if (HasFatalFailure()) return;
    }
  }
};

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
            const Shape shape = {.dtype = dtype,
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
      all.emplace_back(Shape{.dtype = dtype, .misalign = misalign, .to_misalign = 16 - misalign},
                       rotation, 10000, 10000, random_);
    }
    for (const int64_t block_tokens : {1, 16, 24}) {
      for (const Layout layout : kLayouts) {
        all.emplace_back(Shape{.dtype = dtype,
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
    const TensorView got = moved.rows().moved();
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
