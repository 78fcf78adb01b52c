// The kernel that copies rows, on the host or on a GPU (cuda_kernels.h), against the reference
// backend.
#include <gtest/gtest.h>

#include <cstring>
#include <list>
#include <memory>

#include "kernels/reference/reference_backend.h"
#include "tests/kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/gathered_rows.h"

namespace structkv::cuda {
namespace {

using testing::GatheredRows;
using testing::GatherShape;

constexpr Layout kLayouts[] = {Layout::kHeadTokenDim, Layout::kTokenHeadDim};

class CudaGatherTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string why = testing::WhyNoCuda(); !why.empty()) GTEST_SKIP() << why;
  }

  // All in one call.
  void ExpectCopied(const std::vector<GatherShape>& shapes) {
    std::list<GatheredRows> all;
    std::vector<GatherJob> jobs;
    for (const GatherShape& shape : shapes) jobs.push_back(all.emplace_back(shape, random_).job());
    testing::RunCudaGather(jobs);
    for (GatheredRows& rows : all) rows.Expect(*reference_);
  }

  const std::unique_ptr<Backend> reference_ = reference::CreateReferenceBackend();
  std::mt19937_64 random_ = testing::Random(4700);
};

TEST_F(CudaGatherTest, CopiesEveryTypeLayoutAndBlock) {
  for (const DType dtype :
       {DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3, DType::kF8E5M2}) {
    std::vector<GatherShape> shapes;
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
  std::vector<GatherShape> shapes;
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
  std::vector<GatherShape> shapes;
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

}  // namespace
}  // namespace structkv::cuda
