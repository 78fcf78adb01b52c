// Saliency of every backend against the oracle.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <tuple>

#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/random_tensor.h"
#include "tests/kernels/saliency_bound.h"
#include "tests/kernels/saliency_inputs.h"

namespace structkv {
namespace {

using ::testing::Combine;
using testing::Expected;
using testing::ExpectNear;
using ::testing::HasSubstr;
using testing::Inputs;
using testing::RowLse;
using testing::Shape;
using ::testing::Values;
using ::testing::ValuesIn;
using testing::WindowMaxOf;

const Shape kShapes[] = {
    {1, 1, 1, 32, 1},       // one token
    {2, 1, 7, 40, 7},       // nothing but the window
    {4, 2, 64, 64, 64},     // the largest window, alone
    {3, 1, 65, 32, 64},     // and with one token before it
    {8, 8, 241, 72, 8},     // groups of one; one token past a tile
    {8, 2, 479, 128, 8},    // the usual geometry in small
    {16, 1, 251, 256, 5},   // a group of 16, rows over several blocks
    {5, 1, 700, 56, 3},     // 15 rows
    {6, 2, 1000, 32, 8},    // the captured model's
    {4, 1, 123, 512, 8},    // latent keys
    {4, 1, 260, 576, 9},    // with their rotary part
    {2, 2, 6001, 32, 2},    // several tasks along the tokens
    {24, 3, 487, 104, 7},   // 56 rows
    {7, 1, 253, 64, 8},     // a group of 7
    {16, 1, 263, 576, 8},   // DeepSeek-V2-Lite's heads on latent keys
    {128, 1, 131, 576, 2},  // DeepSeek-V3's
};

using Case = std::tuple<std::string, DType, Layout, Shape>;

class SaliencyTest : public ::testing::TestWithParam<Case> {
 protected:
  const std::unique_ptr<Backend> backend_ = testing::MakeBackend(std::get<0>(GetParam()));
  const DType dtype_ = std::get<1>(GetParam());
  const Layout layout_ = std::get<2>(GetParam());
  const Shape shape_ = std::get<3>(GetParam());
  std::mt19937_64 random_ = testing::Random(shape_.tokens * 1000 + shape_.dim);

  // The oracle is slow and its inputs are the same for every backend: computed once.
  const std::vector<float>& Once(const char* what,
                                 absl::FunctionRef<std::vector<float>()> compute) {
    static auto* const known =
        new std::map<std::tuple<std::string, DType, Layout, int64_t, int64_t, int64_t>,
                     std::vector<float>>();
    const auto key = std::make_tuple(std::string(what), dtype_, layout_, shape_.tokens, shape_.dim,
                                     shape_.query_heads);
    const auto found = known->find(key);
    return found != known->end() ? found->second : known->emplace(key, compute()).first->second;
  }

  std::vector<float> Run(const SaliencyParams& params, ParallelFor parallel = SerialFor) {
    std::vector<float> out(params.keys.heads * params.keys.tokens, -1.0F);
    EXPECT_EQ(backend_->Saliency(params, out.data(), nullptr, parallel), absl::OkStatus());
    return out;
  }
};

TEST_P(SaliencyTest, AgreesWithTheOracle) {
  const Inputs inputs(shape_, dtype_, layout_, random_);
  const std::vector<float> actual = Run(inputs.params());
  ExpectNear(*backend_, actual, Once("computed", [&] { return Expected(inputs.params()); }),
             inputs.params());
  // Each query row's attention sums to 1.
  const int64_t group = shape_.query_heads / shape_.kv_heads;
  const testing::SaliencyBound bound(inputs.params(), backend_->KeepsHalfWeights(inputs.params()));
  for (int64_t g = 0; g < shape_.kv_heads; ++g) {
    double sum = 0;
    for (int64_t j = 0; j < shape_.tokens; ++j) sum += actual[g * shape_.tokens + j];
    EXPECT_NEAR(sum, group, bound.Tolerance(g, group));
  }
}

TEST_P(SaliencyTest, TakesTheCallersLogSumExp) {
  const Inputs inputs(shape_, dtype_, layout_, random_);
  SaliencyParams params = inputs.params();
  const std::vector<float> lse = Once("lse", [&] { return RowLse(params); });
  params.lse = lse.data();
  ExpectNear(*backend_, Run(params), Once("given", [&] { return Expected(params); }), params);
}

TEST_P(SaliencyTest, TakesTheLargestOfTheWindow) {
  const Inputs inputs(shape_, dtype_, layout_, random_);
  SaliencyParams params = WindowMaxOf(inputs.params());
  ExpectNear(*backend_, Run(params), Once("largest", [&] { return Expected(params); }), params);
  const std::vector<float> lse = Once("largest lse", [&] { return RowLse(params); });
  params.lse = lse.data();
  ExpectNear(*backend_, Run(params), Once("largest given", [&] { return Expected(params); }),
             params);
}

TEST_P(SaliencyTest, DoesNotDependOnHowTasksRun) {
  const Inputs inputs(shape_, dtype_, layout_, random_);
  const std::vector<float> lse(shape_.query_heads * shape_.window, 1.5F);
  SaliencyParams params = inputs.params();
  EXPECT_EQ(Run(params), Run(params, testing::BackwardsOnThreads));
  params.lse = lse.data();
  EXPECT_EQ(Run(params), Run(params, testing::BackwardsOnThreads));
}

TEST_P(SaliencyTest, NeedsNoAlignment) {
  std::mt19937_64 again = random_;
  const Inputs aligned(shape_, dtype_, layout_, random_);
  const Inputs shifted(shape_, dtype_, layout_, again, 3);
  EXPECT_EQ(Run(aligned.params()), Run(shifted.params()));
}

std::string Name(const ::testing::TestParamInfo<Case>& instance) {
  const Shape& s = std::get<3>(instance.param);
  const auto number = [](int64_t n) { return std::to_string(n); };
  return std::get<0>(instance.param) + "_" + std::string(DTypeName(std::get<1>(instance.param))) +
         "_" + std::string(LayoutName(std::get<2>(instance.param))) + "_q" + number(s.query_heads) +
         "_kv" + number(s.kv_heads) + "_n" + number(s.tokens) + "_d" + number(s.dim) + "_w" +
         number(s.window);
}

INSTANTIATE_TEST_SUITE_P(All, SaliencyTest,
                         Combine(ValuesIn(testing::BackendsUnderTest()),
                                 Values(DType::kF32, DType::kF16, DType::kBF16),
                                 Values(Layout::kHeadTokenDim, Layout::kTokenHeadDim),
                                 ValuesIn(kShapes)),
                         Name);

using BadCase = std::tuple<std::string, DType>;

class SaliencyInputTest : public ::testing::TestWithParam<BadCase> {
 protected:
  const std::unique_ptr<Backend> backend_ = testing::MakeBackend(std::get<0>(GetParam()));
  const DType dtype_ = std::get<1>(GetParam());
  const Shape shape_ = {4, 2, 2500, 64, 8};
  std::mt19937_64 random_ = testing::Random(7);
  Inputs inputs_{shape_, dtype_, Layout::kHeadTokenDim, random_};
  std::vector<float> out_ = std::vector<float>(shape_.kv_heads * shape_.tokens);
  BadStatistic bad_;

  absl::Status Run(const SaliencyParams& params) {
    return backend_->Saliency(params, out_.data(), &bad_, testing::BackwardsOnThreads);
  }
};

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

TEST_P(SaliencyInputTest, NamesTheLowestTokenThatIsNotFinite) {
  const std::vector<float> lse(shape_.query_heads * shape_.window, 0.0F);
  for (const float value : {kNan, kInf, -kInf}) {
    for (const bool with_lse : {false, true}) {
      for (const int64_t token :
           {int64_t{0}, int64_t{1}, int64_t{239}, int64_t{1300}, int64_t{2491}, int64_t{2499}}) {
        SCOPED_TRACE(::testing::Message() << value << " at " << token << " lse " << with_lse);
        Inputs inputs(shape_, dtype_, Layout::kHeadTokenDim, random_);
        inputs.keys.Set(1, token, 13, value);
        // A later one of the head before does not come first.
        if (token < 2499) inputs.keys.Set(0, token + 1, 5, value);
        SaliencyParams params = inputs.params();
        if (with_lse) params.lse = lse.data();
        const absl::Status status = Run(params);
        EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
        EXPECT_THAT(std::string(status.message()),
                    HasSubstr("kv head 1, token " + std::to_string(token) + ":"));
        EXPECT_EQ(bad_.head, 1);
        EXPECT_EQ(bad_.token, token);
        EXPECT_FALSE(std::isfinite(bad_.value));
      }
    }
  }
}

TEST_P(SaliencyInputTest, OfSeveralHeadsNamesTheLowest) {
  inputs_.keys.Set(1, 700, 0, kNan);
  inputs_.keys.Set(0, 700, 63, kInf);
  EXPECT_FALSE(Run(inputs_.params()).ok());
  EXPECT_EQ(bad_.head, 0);
  EXPECT_EQ(bad_.token, 700);
}

TEST_P(SaliencyInputTest, NamesAQueryRowThatIsNotFinite) {
  for (const float value : {kNan, kInf, -kInf}) {
    Inputs inputs(shape_, dtype_, Layout::kTokenHeadDim, random_);
    inputs.queries.Set(2, 5, 63, value);
    inputs.queries.Set(3, 1, 0, value);
    const absl::Status status = Run(inputs.params());
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("queries: query head 2, window row 5 (token 2497)"));
    EXPECT_EQ(bad_.head, 1);
    EXPECT_EQ(bad_.token, 2497);
    EXPECT_FALSE(std::isfinite(bad_.value));
  }
}

TEST_P(SaliencyInputTest, NamesALogSumExpThatIsNotFinite) {
  std::vector<float> lse(shape_.query_heads * shape_.window, 0.0F);
  lse[3 * 8 + 2] = kNan;
  SaliencyParams params = inputs_.params();
  params.lse = lse.data();
  const absl::Status status = Run(params);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("lse: query head 3, window row 2"));
  EXPECT_EQ(bad_.head, 1);
  EXPECT_EQ(bad_.token, 2494);
}

TEST_P(SaliencyInputTest, RefusesALogSumExpSoLowThatWeightsOverflow) {
  std::vector<float> lse(shape_.query_heads * shape_.window, -1000.0F);
  SaliencyParams params = inputs_.params();
  params.lse = lse.data();
  EXPECT_EQ(Run(params).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(bad_.token, 0);
  EXPECT_EQ(bad_.head, 0);
  EXPECT_EQ(Run(WindowMaxOf(params)).code(), absl::StatusCode::kInvalidArgument);
}

TEST_P(SaliencyInputTest, IsSafeForLargeScores) {
  SaliencyParams params = inputs_.params();
  for (const float scale : {100.0F, -100.0F, 1e9F, 1e36F, 1e-30F}) {
    SCOPED_TRACE(scale);
    params.scale = scale;
    ASSERT_EQ(Run(params), absl::OkStatus());
    double sum = 0;
    for (float s : out_) {
      ASSERT_TRUE(s >= 0 && std::isfinite(s));
      sum += s;
    }
    EXPECT_NEAR(sum, static_cast<double>(shape_.query_heads), 1e-3);
  }
}

TEST_P(SaliencyInputTest, FollowsScoresThatRiseOrFall) {
  for (int64_t h = 0; h < shape_.query_heads; ++h) {
    for (int64_t r = 0; r < shape_.window; ++r) inputs_.queries.Set(h, r, 0, 8.0F);
  }
  SaliencyParams params = inputs_.params();
  params.scale = 0.125F;
  // Up to a fifth of float32's range of powers of two from one tile of 240 tokens to the next.
  for (const float rise : {30.0F, 120.0F, 360.0F, -360.0F}) {
    SCOPED_TRACE(rise);
    for (int64_t h = 0; h < shape_.kv_heads; ++h) {
      for (int64_t j = 0; j < shape_.tokens; ++j) {
        const float share = static_cast<float>(j) / static_cast<float>(shape_.tokens);
        inputs_.keys.Set(h, j, 0, rise * share);
      }
    }
    ASSERT_EQ(Run(params), absl::OkStatus());
    ExpectNear(*backend_, out_, Expected(params), params);
  }
}

TEST_P(SaliencyInputTest, TakesTheScale) {
  SaliencyParams params = inputs_.params();
  for (const float scale : {0.3F, -0.2F}) {
    params.scale = scale;
    ASSERT_EQ(Run(params), absl::OkStatus());
    ExpectNear(*backend_, out_, Expected(params), params);
  }
}

TEST_P(SaliencyInputTest, EqualKeysShareEvenly) {
  for (int64_t h = 0; h < shape_.kv_heads; ++h) {
    for (int64_t j = 0; j < shape_.tokens; ++j) {
      for (int64_t e = 0; e < shape_.dim; ++e) inputs_.keys.Set(h, j, e, 0.25F * (e % 3));
    }
  }
  ASSERT_EQ(Run(inputs_.params()), absl::OkStatus());
  ExpectNear(*backend_, out_, Expected(inputs_.params()), inputs_.params());
  for (int64_t j = 1; j <= shape_.tokens - shape_.window; ++j) EXPECT_EQ(out_[j], out_[j - 1]);
}

TEST_P(SaliencyInputTest, TakesAnyStrides) {
  // Every second token of a tensor twice as long.
  Inputs wide({4, 2, 2 * shape_.tokens, 64, 8}, dtype_, Layout::kHeadTokenDim, random_);
  Inputs dense(shape_, dtype_, Layout::kHeadTokenDim, random_);
  SaliencyParams params = wide.params();
  params.keys.tokens = shape_.tokens;
  params.keys.token_stride *= 2;
  ASSERT_EQ(Run(params), absl::OkStatus());
  ExpectNear(*backend_, out_, Expected(params), params);
}

TEST_P(SaliencyInputTest, RefusesShapesThatDoNotFit) {
  const auto expect = [&](const char* field, auto change) {
    SaliencyParams params = inputs_.params();
    change(params);
    const absl::Status status = Run(params);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(field));
  };
  expect("window: 65", [](SaliencyParams& p) { p.queries.tokens = 65; });
  expect("window: 0", [](SaliencyParams& p) { p.queries.tokens = 0; });
  expect("window: 8", [](SaliencyParams& p) { p.keys.tokens = 7; });
  expect("key_dim: 36", [](SaliencyParams& p) { p.queries.dim = p.keys.dim = 36; });
  expect("key_dim: 24", [](SaliencyParams& p) { p.queries.dim = p.keys.dim = 24; });
  expect("key_dim: 584", [](SaliencyParams& p) { p.queries.dim = p.keys.dim = 584; });
  expect("dim 32", [](SaliencyParams& p) { p.queries.dim = 32; });
  expect("query_heads: 3", [](SaliencyParams& p) { p.queries.heads = 3; });
  expect("query_heads: 4, must be kv_heads, 2, with window_max",
         [](SaliencyParams& p) { p.window_max = true; });
  expect("scale", [](SaliencyParams& p) { p.scale = kNan; });
  expect("keys", [](SaliencyParams& p) { p.keys.tokens = 0; });
  expect("dtype", [this](SaliencyParams& p) {
    p.queries.dtype = dtype_ == DType::kF32 ? DType::kF16 : DType::kF32;
  });
}

TEST_P(SaliencyInputTest, SaysHowMuchScratchItTakes) {
  SaliencyParams params = inputs_.params();
  const int64_t small = backend_->SaliencyScratchBytes(params);
  EXPECT_GT(small, 0);
  params.keys.tokens = int64_t{1} << 20;
  const int64_t large = backend_->SaliencyScratchBytes(params);
  EXPECT_GE(large, small);
  // Never as much as a layer's scores.
  EXPECT_LE(large, (int64_t{1} << 20) * 32 * 5);
}

std::string BadCaseName(const ::testing::TestParamInfo<BadCase>& instance) {
  return std::get<0>(instance.param) + "_" + std::string(DTypeName(std::get<1>(instance.param)));
}

INSTANTIATE_TEST_SUITE_P(All, SaliencyInputTest,
                         Combine(ValuesIn(testing::BackendsUnderTest()),
                                 Values(DType::kF32, DType::kF16, DType::kBF16)),
                         BadCaseName);

}  // namespace
}  // namespace structkv
