// Tensors in blocks, for every backend: the same answers, to the bit, as for dense ones.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>

#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/paged_tensor.h"
#include "tests/kernels/saliency_inputs.h"

namespace structkv {
namespace {

using ::testing::Combine;
using ::testing::HasSubstr;
using testing::Inputs;
using testing::PagedTensor;
using testing::Shape;
using testing::Tensor;
using testing::Types;
using ::testing::ValuesIn;

constexpr int64_t kBlockTokens[] = {1, 7, 16, 32, 64, 300};
constexpr Layout kLayouts[] = {Layout::kHeadTokenDim, Layout::kTokenHeadDim};

// None is a multiple of all blocks: last blocks are partial ones.
const Shape kShapes[] = {
    {1, 1, 1, 32, 1},      // one token
    {4, 2, 64, 64, 64},    // the window alone
    {8, 2, 479, 128, 8},   // groups of 4
    {7, 1, 250, 40, 3},    // a group of 7
    {6, 2, 2501, 32, 2},   // several tasks along the tokens
    {16, 1, 263, 576, 2},  // latent keys
};

const Types kTypes[] = {
    {DType::kF32, DType::kF32},     {DType::kF16, DType::kF16},     {DType::kBF16, DType::kBF16},
    {DType::kBF16, DType::kF8E4M3}, {DType::kBF16, DType::kF8E5M2}, {DType::kF32, DType::kF8E4M3},
    {DType::kF16, DType::kF8E5M2},
};

using Case = std::tuple<std::string, Types, Shape>;

class PagedSaliencyTest : public ::testing::TestWithParam<Case> {
 protected:
  const std::unique_ptr<Backend> backend_ = testing::MakeBackend(std::get<0>(GetParam()));
  const Shape shape_ = std::get<2>(GetParam());
  std::mt19937_64 random_ = testing::Random(shape_.tokens * 1000 + shape_.dim + 2);
  Inputs inputs_{shape_, std::get<1>(GetParam()), Layout::kHeadTokenDim, random_};

  std::vector<float> Run(const SaliencyParams& params) {
    std::vector<float> out(params.keys.heads * params.keys.tokens, -1.0F);
    EXPECT_EQ(backend_->Saliency(params, out.data(), nullptr, testing::BackwardsOnThreads),
              absl::OkStatus());
    return out;
  }

  void ExpectTheSameInBlocks(const SaliencyParams& dense) {
    const std::vector<float> expected = Run(dense);
    for (const int64_t block_tokens : kBlockTokens) {
      for (const Layout layout : kLayouts) {
        const PagedTensor paged(inputs_.keys.view(), layout, block_tokens, random_);
        SaliencyParams params = dense;
        params.keys = paged.view();
        EXPECT_EQ(Run(params), expected)
            << "blocks of " << block_tokens << ", " << LayoutName(layout);
      }
    }
  }
};

TEST_P(PagedSaliencyTest, IsThatOfDenseKeys) { ExpectTheSameInBlocks(inputs_.params()); }

TEST_P(PagedSaliencyTest, IsThatOfDenseKeysWithTheCallersLogSumExp) {
  const std::vector<float> lse(shape_.query_heads * shape_.window, 1.5F);
  SaliencyParams params = inputs_.params();
  params.lse = lse.data();
  ExpectTheSameInBlocks(params);
}

// Sums of scores that are beyond float32 though no score is.
TEST_P(PagedSaliencyTest, IsThatOfDenseKeysForHugeScores) {
  SaliencyParams params = inputs_.params();
  const float deviation = IsFp8(params.keys.dtype) ? testing::kFp8Deviation : 1.0F;
  params.scale = 1e37F / (deviation * std::sqrt(static_cast<float>(shape_.dim)));
  params.key_scales = nullptr;
  ExpectTheSameInBlocks(params);
}

TEST_P(PagedSaliencyTest, NamesATokenByItsPositionInTheSequence) {
  const int64_t token = shape_.tokens / 2;
  const int64_t head = shape_.kv_heads - 1;
  inputs_.keys.Set(head, token, 31, std::numeric_limits<float>::quiet_NaN());
  const PagedTensor paged(inputs_.keys.view(), Layout::kTokenHeadDim, 16, random_);
  SaliencyParams params = inputs_.params();
  params.keys = paged.view();
  std::vector<float> out(shape_.kv_heads * shape_.tokens);
  BadStatistic bad;
  const absl::Status status =
      backend_->Saliency(params, out.data(), &bad, testing::BackwardsOnThreads);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(bad.head, head);
  EXPECT_EQ(bad.token, token);
}

TEST_P(PagedSaliencyTest, RefusesBlocksOfLessThanNothing) {
  SaliencyParams params = inputs_.params();
  params.keys.block_tokens = -1;
  std::vector<float> out(shape_.kv_heads * shape_.tokens);
  const absl::Status status = backend_->Saliency(params, out.data(), nullptr, SerialFor);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("block_tokens -1"));
}

std::string Name(const ::testing::TestParamInfo<Case>& instance) {
  const Types& types = std::get<1>(instance.param);
  const Shape& s = std::get<2>(instance.param);
  const auto number = [](int64_t n) { return std::to_string(n); };
  return std::get<0>(instance.param) + "_" + std::string(DTypeName(types.queries)) + "_" +
         std::string(DTypeName(types.keys)) + "_q" + number(s.query_heads) + "_kv" +
         number(s.kv_heads) + "_n" + number(s.tokens) + "_d" + number(s.dim);
}

INSTANTIATE_TEST_SUITE_P(All, PagedSaliencyTest,
                         Combine(ValuesIn(testing::BackendsUnderTest()), ValuesIn(kTypes),
                                 ValuesIn(kShapes)),
                         Name);

class PagedGatherTest : public ::testing::TestWithParam<std::string> {
 protected:
  const std::unique_ptr<Backend> backend_ = testing::MakeBackend(GetParam());
  std::mt19937_64 random_ = testing::Random(1200);

  std::vector<int32_t> Positions(int64_t lists, int64_t tokens, int64_t kept) {
    std::vector<int32_t> positions;
    for (int64_t h = 0; h < lists; ++h) {
      std::vector<int32_t> all(static_cast<size_t>(tokens));
      std::iota(all.begin(), all.end(), 0);
      std::shuffle(all.begin(), all.end(), random_);
      std::sort(all.begin(), all.begin() + kept);
      positions.insert(positions.end(), all.begin(), all.begin() + kept);
    }
    return positions;
  }

  // Gathers from `from` (of the same vectors as `dense`) into blocks in order, and compares every
  // vector and what lies around them.
  void CheckToBlocks(const TensorView& dense, const TensorView& from, Layout layout,
                     int64_t block_tokens, int64_t kept, bool per_head) {
    const std::vector<int32_t> positions =
        Positions(per_head ? dense.heads : 1, dense.tokens, kept);
    const int64_t blocks = (kept + block_tokens - 1) / block_tokens;
    const auto row_bytes = static_cast<size_t>(dense.dim) * DTypeSize(dense.dtype);
    constexpr std::byte kUntouched{0x5A};
    std::vector<std::byte> out(static_cast<size_t>(blocks * block_tokens * dense.heads) * row_bytes,
                               kUntouched);
    const auto to = MutableTensorView::Paged(out.data(), dense.dtype, layout, dense.heads, kept,
                                             dense.dim, block_tokens);
    EXPECT_EQ(backend_->Gather(from, positions.data(), per_head, to, testing::BackwardsOnThreads),
              absl::OkStatus());
    for (int64_t h = 0; h < dense.heads; ++h) {
      for (int64_t i = 0; i < blocks * block_tokens; ++i) {
        const int64_t block = i / block_tokens;
        const int64_t place = i % block_tokens;
        const int64_t row = layout == Layout::kHeadTokenDim
                                ? (block * dense.heads + h) * block_tokens + place
                                : (block * block_tokens + place) * dense.heads + h;
        const std::byte* got = out.data() + static_cast<size_t>(row) * row_bytes;
        if (i >= kept) {
          ASSERT_EQ(std::count(got, got + row_bytes, kUntouched), static_cast<int64_t>(row_bytes))
              << "wrote behind the last token";
          continue;
        }
        const int32_t position = positions[(per_head ? h * kept : 0) + i];
        ASSERT_EQ(std::memcmp(got, dense.Row(h, position), row_bytes), 0)
            << DTypeName(dense.dtype) << ", " << LayoutName(layout) << ", blocks of "
            << block_tokens << ", head " << h << ", row " << i << " of " << kept;
      }
    }
  }

  // From blocks into a dense tensor.
  void CheckFromBlocks(const TensorView& dense, const TensorView& paged, Layout layout,
                       int64_t kept, bool per_head) {
    const std::vector<int32_t> positions =
        Positions(per_head ? dense.heads : 1, dense.tokens, kept);
    Tensor out(dense.dtype, layout, dense.heads, kept, dense.dim, /*misalign=*/1);
    EXPECT_EQ(backend_->Gather(paged, positions.data(), per_head, out.mutable_view(),
                               testing::BackwardsOnThreads),
              absl::OkStatus());
    for (int64_t h = 0; h < dense.heads; ++h) {
      for (int64_t i = 0; i < kept; ++i) {
        const int32_t position = positions[(per_head ? h * kept : 0) + i];
        ASSERT_EQ(std::memcmp(out.view().Row(h, i), dense.Row(h, position),
                              static_cast<size_t>(dense.dim) * DTypeSize(dense.dtype)),
                  0)
            << DTypeName(dense.dtype) << ", " << LayoutName(layout) << ", head " << h << ", row "
            << i << " of " << kept;
      }
    }
  }
};

TEST_P(PagedGatherTest, CopiesToTheByte) {
  constexpr int64_t kHeads = 3;
  constexpr int64_t kCount = 301;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF8E4M3}) {
    for (const int64_t dim : {40, 128, 256, 512}) {
      Tensor dense(dtype, Layout::kHeadTokenDim, kHeads, kCount, dim);
      dense.Fill(random_);
      for (const Layout layout : kLayouts) {
        for (const int64_t block_tokens : {1, 16, 24, 64, 512}) {
          const PagedTensor paged(dense.view(), layout, block_tokens, random_);
          for (const bool per_head : {false, true}) {
            for (const int64_t kept : {int64_t{1}, int64_t{37}, int64_t{64}, kCount}) {
              CheckToBlocks(dense.view(), dense.view(), layout, block_tokens, kept, per_head);
              CheckToBlocks(dense.view(), paged.view(), layout, block_tokens, kept, per_head);
              CheckToBlocks(dense.view(), paged.view(), layout, 32, kept, per_head);
              for (const Layout out : kLayouts) {
                CheckFromBlocks(dense.view(), paged.view(), out, kept, per_head);
              }
            }
          }
        }
      }
    }
  }
}

// Values that are the first elements of latent keys: rows are further apart than they are long.
TEST_P(PagedGatherTest, CopiesAPartOfEachRow) {
  Tensor dense(DType::kBF16, Layout::kHeadTokenDim, 1, 301, 576);
  dense.Fill(random_);
  const PagedTensor paged(dense.view(), Layout::kHeadTokenDim, 16, random_);
  TensorView part = dense.view();
  TensorView paged_part = paged.view();
  part.dim = paged_part.dim = 512;
  CheckToBlocks(part, paged_part, Layout::kHeadTokenDim, 16, 100, /*per_head=*/false);
  CheckToBlocks(part, part, Layout::kHeadTokenDim, 16, 100, /*per_head=*/false);
  CheckFromBlocks(part, paged_part, Layout::kHeadTokenDim, 100, /*per_head=*/false);
}

// Large enough that the rows go past the caches, where a backend does that.
TEST_P(PagedGatherTest, CopiesManyRowsToTheByte) {
  constexpr int64_t kHeads = 4;
  constexpr int64_t kDim = 128;
  constexpr int64_t kKept = (int64_t{9} << 20) / (kHeads * kDim * 2) + 3;
  Tensor dense(DType::kBF16, Layout::kHeadTokenDim, kHeads, kKept + 1000, kDim);
  dense.Fill(random_);
  for (const Layout layout : kLayouts) {
    const PagedTensor paged(dense.view(), layout, 16, random_);
    for (const bool per_head : {false, true}) {
      CheckToBlocks(dense.view(), paged.view(), layout, 16, kKept, per_head);
      CheckFromBlocks(dense.view(), paged.view(), layout, kKept, per_head);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, PagedGatherTest, ValuesIn(testing::BackendsUnderTest()),
                         [](const auto& instance) { return instance.param; });

}  // namespace
}  // namespace structkv
