// The CUDA saliency kernels against the oracle, on the host or on a GPU (cuda_kernels.h).
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/reference/reference_backend.h"
#include "tests/kernels/cuda/cuda_kernels.h"
#include "tests/kernels/paged_tensor.h"
#include "tests/kernels/random_tensor.h"
#include "tests/kernels/saliency_bound.h"
#include "tests/kernels/saliency_inputs.h"

namespace structkv {
namespace {

using cuda::kNothingBad;
using ::testing::Combine;
using testing::CudaSaliency;
using testing::Expected;
using testing::Inputs;
using testing::PagedTensor;
using testing::RowLse;
using testing::RunCudaSaliency;
using testing::Shape;
using testing::Types;
using ::testing::ValuesIn;

const Shape kShapes[] = {
    {1, 1, 1, 32, 1},      // one token
    {2, 1, 7, 40, 7},      // nothing but the window
    {4, 2, 64, 64, 64},    // the largest window, alone, in several chunks of rows
    {8, 8, 65, 72, 8},     // a head for each warp; one token past a unit
    {8, 2, 241, 128, 8},   // the usual geometry in small
    {16, 1, 83, 256, 5},   // a group of 16, longer than what is in flight
    {15, 5, 600, 96, 3},   // more heads than a tile has warps for, several tiles
    {9, 9, 130, 64, 2},    // more heads than warps
    {5, 1, 531, 56, 3},    // several tiles of one head
    {16, 1, 40, 576, 8},   // latent keys
    {128, 1, 35, 576, 2},  // and under many heads
};

const Types kTypes[] = {
    {DType::kF16, DType::kF16},    {DType::kBF16, DType::kBF16},   {DType::kF32, DType::kF32},
    {DType::kF16, DType::kF8E4M3}, {DType::kBF16, DType::kF8E4M3}, {DType::kF32, DType::kF8E4M3},
    {DType::kF16, DType::kF8E5M2}, {DType::kBF16, DType::kF8E5M2}, {DType::kF32, DType::kF8E5M2},
};

void ExpectNear(const CudaSaliency& actual, const std::vector<float>& expected,
                const SaliencyParams& params) {
  EXPECT_EQ(actual.flags.score, kNothingBad);
  EXPECT_EQ(actual.flags.query, kNothingBad);
  EXPECT_EQ(actual.flags.lse, kNothingBad);
  testing::ExpectNear(actual.per_head, expected, params, /*half=*/params.lse == nullptr);
}

using Case = std::tuple<Types, Shape>;

void SkipWhereNoneRuns() {
  if (const std::string why = testing::WhyNoCuda(); !why.empty()) GTEST_SKIP() << why;
}

class CudaSaliencyTest : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override { SkipWhereNoneRuns(); }

  const Types types_ = std::get<0>(GetParam());
  const Shape shape_ = std::get<1>(GetParam());
  std::mt19937_64 random_ = testing::Random(shape_.tokens * 1000 + shape_.dim);
};

TEST_P(CudaSaliencyTest, AgreesWithTheOracle) {
  const Inputs inputs(shape_, types_, Layout::kHeadTokenDim, random_);
  SaliencyParams params = inputs.params();
  ExpectNear(RunCudaSaliency(params), Expected(params), params);
  const std::vector<float> lse = RowLse(params);
  params.lse = lse.data();
  ExpectNear(RunCudaSaliency(params), Expected(params), params);
}

TEST_P(CudaSaliencyTest, TakesTheLargestOfTheWindow) {
  const Inputs inputs(shape_, types_, Layout::kHeadTokenDim, random_);
  SaliencyParams params = testing::WindowMaxOf(inputs.params());
  ExpectNear(RunCudaSaliency(params), Expected(params), params);
  const std::vector<float> lse = RowLse(params);
  params.lse = lse.data();
  ExpectNear(RunCudaSaliency(params), Expected(params), params);
}

std::string Name(const ::testing::TestParamInfo<Case>& instance) {
  const auto& [types, s] = instance.param;
  const auto number = [](int64_t n) { return std::to_string(n); };
  return std::string(DTypeName(types.queries)) + "_" + std::string(DTypeName(types.keys)) + "_q" +
         number(s.query_heads) + "_kv" + number(s.kv_heads) + "_n" + number(s.tokens) + "_d" +
         number(s.dim) + "_w" + number(s.window);
}

INSTANTIATE_TEST_SUITE_P(All, CudaSaliencyTest, Combine(ValuesIn(kTypes), ValuesIn(kShapes)), Name);

class CudaSaliencyInputTest : public ::testing::Test {
 protected:
  void SetUp() override { SkipWhereNoneRuns(); }

  const Shape shape_ = {6, 3, 210, 64, 8};
  std::mt19937_64 random_ = testing::Random(3);
  Inputs inputs_{shape_, DType::kBF16, Layout::kHeadTokenDim, random_};
  const std::vector<float> lse_ = std::vector<float>(6 * 8, 1.5F);
};

TEST_F(CudaSaliencyInputTest, DependsOnNoLayoutPagesOrBlocks) {
  for (const bool with_lse : {false, true}) {
    SaliencyParams params = inputs_.params();
    if (with_lse) params.lse = lse_.data();
    const CudaSaliency expected = RunCudaSaliency(params);
    EXPECT_EQ(RunCudaSaliency(params, 1).per_head, expected.per_head);
    EXPECT_EQ(RunCudaSaliency(params, 5).saliency, expected.saliency);
    for (const Layout layout : {Layout::kHeadTokenDim, Layout::kTokenHeadDim}) {
      for (const int64_t block_tokens : {1, 16, 48}) {
        const PagedTensor paged(inputs_.keys.view(), layout, block_tokens, random_);
        SaliencyParams other = params;
        other.keys = paged.view();
        EXPECT_EQ(RunCudaSaliency(other).per_head, expected.per_head);
      }
    }
    std::mt19937_64 random = testing::Random(3);
    const Inputs token_first(shape_, DType::kBF16, Layout::kTokenHeadDim, random, 0);
    SaliencyParams other = token_first.params();
    other.lse = params.lse;
    EXPECT_EQ(RunCudaSaliency(other).per_head, expected.per_head);
  }
}

// So many blocks of 16 tokens that the threads which combine their row sums take several rounds.
TEST_F(CudaSaliencyInputTest, CombinesManyBlocks) {
  const Shape shape = {1, 1, 70'001, 32, 1};
  const Inputs inputs(shape, {DType::kBF16, DType::kBF16}, Layout::kHeadTokenDim, random_);
  ExpectNear(RunCudaSaliency(inputs.params()), Expected(inputs.params()), inputs.params());
}

TEST_F(CudaSaliencyInputTest, SumsHeadsInOrderAndAccumulates) {
  std::vector<float> before;
  for (int j = 0; j < 210; ++j) before.push_back(0.01F * static_cast<float>(j));
  for (const bool with_lse : {false, true}) {
    SaliencyParams params = inputs_.params();
    if (with_lse) params.lse = lse_.data();
    const CudaSaliency out = RunCudaSaliency(params, 2, before, 0.9F);
    for (size_t j = 0; j < 210; ++j) {
      const float sum = (out.per_head[j] + out.per_head[210 + j]) + out.per_head[420 + j];
      EXPECT_EQ(out.saliency[j], sum);
      EXPECT_EQ(out.centrality[j], std::fma(0.9F, before[j], sum));
    }
    // The parts of its sums are those that are made of it later.
    std::vector<cuda::SumsPart> parts(static_cast<size_t>(cuda::SumsParts(210)));
    testing::RunCudaStatistics(
        {.values = out.saliency.data(), .heads = 1, .tokens = 210, .parts = parts.data()});
    ASSERT_EQ(out.parts.size(), parts.size());
    for (size_t i = 0; i < parts.size(); ++i) {
      EXPECT_GT(parts[i].total, 0.0);
      EXPECT_EQ(out.parts[i].total, parts[i].total);
      EXPECT_EQ(out.parts[i].sum_s_log_s, parts[i].sum_s_log_s);
      EXPECT_EQ(out.parts[i].sum_squares, parts[i].sum_squares);
    }
  }
}

// A negative scale, and scores so large that one token takes all.
TEST_F(CudaSaliencyInputTest, TakesAnyScale) {
  for (const float scale : {-0.2F, 1e-6F, 300.0F}) {
    SaliencyParams params = inputs_.params();
    params.scale = scale;
    if (scale < 100.0F) {
      ExpectNear(RunCudaSaliency(params), Expected(params), params);
      continue;
    }
    const CudaSaliency out = RunCudaSaliency(params);
    double sum = 0;
    for (float value : out.saliency) sum += value;
    EXPECT_NEAR(sum, 6.0, 0.01);
  }
}

TEST_F(CudaSaliencyInputTest, NamesTheLowestTokenThatIsNotFinite) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  for (const float value : {kNan, kInf, -kInf}) {
    for (const int64_t token : {0, 63, 64, 130, 201, 209}) {
      for (const bool with_lse : {false, true}) {
        SCOPED_TRACE(::testing::Message() << value << " at " << token << " lse " << with_lse);
        Inputs inputs(shape_, DType::kBF16, Layout::kHeadTokenDim, random_);
        inputs.keys.Set(1, token, 13, value);
        inputs.keys.Set(2, token, 13, value);
        if (token < 209) inputs.keys.Set(0, token + 1, 5, value);
        SaliencyParams params = inputs.params();
        if (with_lse) params.lse = lse_.data();
        const CudaSaliency out = RunCudaSaliency(params);
        ASSERT_NE(out.flags.score, kNothingBad);
        EXPECT_EQ(cuda::BadToken(out.flags.score), token);
        EXPECT_EQ(cuda::BadHead(out.flags.score), 1);
        EXPECT_EQ(out.flags.query, kNothingBad);
      }
    }
  }
}

TEST_F(CudaSaliencyInputTest, NamesQueriesAndLogSumExpsThatAreNotFinite) {
  inputs_.queries.Set(3, 5, 2, std::numeric_limits<float>::quiet_NaN());
  inputs_.queries.Set(4, 1, 2, std::numeric_limits<float>::infinity());
  std::vector<float> lse = lse_;
  lse[2 * 8 + 6] = -std::numeric_limits<float>::infinity();
  SaliencyParams params = inputs_.params();
  params.lse = lse.data();
  const CudaSaliency out = RunCudaSaliency(params);
  EXPECT_EQ(out.flags.query, cuda::BadRow(3 * 8 + 5, cuda::kNotANumber));
  EXPECT_EQ(out.flags.lse, cuda::BadRow(2 * 8 + 6, cuda::kMinusInfinite));
}

TEST_F(CudaSaliencyInputTest, NamesAWeightThatIsNotFinite) {
  std::vector<float> lse = lse_;
  lse[8] = -500.0F;  // query head 1, of KV head 0
  SaliencyParams params = inputs_.params();
  params.lse = lse.data();
  const CudaSaliency out = RunCudaSaliency(params);
  EXPECT_EQ(out.flags.score, cuda::BadScore(0, 0, cuda::kInfinite));
}

}  // namespace
}  // namespace structkv
