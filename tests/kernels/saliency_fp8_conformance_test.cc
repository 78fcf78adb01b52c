// Saliency of 8-bit keys, under queries of every type, of every backend against the oracle.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <tuple>

#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/fp8_codes.h"
#include "tests/kernels/saliency_inputs.h"

namespace structkv {
namespace {

using ::testing::Combine;
using testing::ExpectNear;
using ::testing::HasSubstr;
using testing::Inputs;
using testing::Shape;
using testing::Types;
using ::testing::ValuesIn;

constexpr int64_t kLatentDim = 576;
// 1 / sqrt(192): latent keys stand for heads of 128 and 64 rotary elements.
constexpr float kLatentScale = 0.072168784F;

const Shape kShapes[] = {
    {1, 1, 1, 32, 1},              // one token
    {4, 4, 77, 64, 8},             // groups of one
    {3, 1, 65, 32, 64},            // a group of 3, the largest window
    {8, 2, 479, 128, 8},           // groups of 4, one token before two tiles' end
    {7, 1, 241, 40, 3},            // a group of 7, one token past a tile
    {16, 1, 251, 256, 5},          // a group of 16, rows over several blocks
    {2, 2, 2501, 48, 2},           // several tasks along the tokens
    {16, 1, 263, kLatentDim, 8},   // latent keys
    {128, 1, 245, kLatentDim, 2},  // and under many heads
};

const Types kTypes[] = {
    {DType::kBF16, DType::kF8E4M3}, {DType::kF16, DType::kF8E4M3}, {DType::kF32, DType::kF8E4M3},
    {DType::kBF16, DType::kF8E5M2}, {DType::kF16, DType::kF8E5M2}, {DType::kF32, DType::kF8E5M2},
};

std::string TypesName(const Types& types) {
  return std::string(DTypeName(types.queries)) + "_" + std::string(DTypeName(types.keys));
}

using Case = std::tuple<std::string, Types, Shape>;

class SaliencyFp8Test : public ::testing::TestWithParam<Case> {
 protected:
  const std::unique_ptr<Backend> backend_ = testing::MakeBackend(std::get<0>(GetParam()));
  const Types types_ = std::get<1>(GetParam());
  const Shape shape_ = std::get<2>(GetParam());
  std::mt19937_64 random_ = testing::Random(shape_.tokens * 1000 + shape_.dim + 1);

  SaliencyParams Params(const Inputs& inputs) const {
    SaliencyParams params = inputs.params();
    if (shape_.dim == kLatentDim) params.scale = kLatentScale;
    return params;
  }

  // The oracle is slow and its inputs are the same for every backend: computed once.
  const std::vector<float>& Once(const char* what,
                                 absl::FunctionRef<std::vector<float>()> compute) {
    static auto* const known =
        new std::map<std::tuple<std::string, std::string, int64_t>, std::vector<float>>();
    const auto key = std::make_tuple(std::string(what), TypesName(types_), shape_.tokens);
    const auto found = known->find(key);
    return found != known->end() ? found->second : known->emplace(key, compute()).first->second;
  }

  std::vector<float> Run(const SaliencyParams& params, ParallelFor parallel = SerialFor) {
    std::vector<float> out(params.keys.heads * params.keys.tokens, -1.0F);
    EXPECT_EQ(backend_->Saliency(params, out.data(), nullptr, parallel), absl::OkStatus());
    return out;
  }
};

TEST_P(SaliencyFp8Test, AgreesWithTheOracle) {
  const Inputs inputs(shape_, types_, Layout::kHeadTokenDim, random_);
  const SaliencyParams params = Params(inputs);
  ExpectNear(*backend_, Run(params), Once("computed", [&] { return testing::Expected(params); }),
             params);
}

TEST_P(SaliencyFp8Test, TakesTheCallersLogSumExp) {
  const Inputs inputs(shape_, types_, Layout::kHeadTokenDim, random_);
  SaliencyParams params = Params(inputs);
  const std::vector<float> lse = Once("lse", [&] { return testing::RowLse(params); });
  params.lse = lse.data();
  ExpectNear(*backend_, Run(params), Once("given", [&] { return testing::Expected(params); }),
             params);
}

TEST_P(SaliencyFp8Test, DependsOnNoLayoutAlignmentOrOrderOfTasks) {
  std::mt19937_64 again = random_;
  const Inputs one(shape_, types_, Layout::kHeadTokenDim, random_);
  const Inputs other(shape_, types_, Layout::kTokenHeadDim, again, /*misalign=*/3);
  const std::vector<float> lse(shape_.query_heads * shape_.window, 1.5F);
  for (const bool with_lse : {false, true}) {
    SaliencyParams a = Params(one);
    SaliencyParams b = Params(other);
    if (with_lse) a.lse = b.lse = lse.data();
    EXPECT_EQ(Run(a), Run(b, testing::BackwardsOnThreads));
  }
}

// An element of 8 bits is the same number in every wider type, and a power of two as the scale
// rounds nothing.
TEST_P(SaliencyFp8Test, EqualsTheSameKeysWidened) {
  const Inputs narrow(shape_, types_, Layout::kHeadTokenDim, random_);
  testing::Tensor wide(types_.queries, Layout::kHeadTokenDim, shape_.kv_heads, shape_.tokens,
                       shape_.dim);
  for (int64_t h = 0; h < shape_.kv_heads; ++h) {
    for (int64_t j = 0; j < shape_.tokens; ++j) {
      const auto* row = reinterpret_cast<const uint8_t*>(narrow.keys.view().Row(h, j));
      for (int64_t e = 0; e < shape_.dim; ++e) {
        wide.Set(h, j, e, static_cast<float>(testing::DecodeFp8(row[e], types_.keys)));
      }
    }
  }
  const std::vector<float> scales(static_cast<size_t>(shape_.kv_heads), 0.0625F);
  SaliencyParams params = narrow.params();
  params.scale = 0.125F;
  params.key_scales = scales.data();
  SaliencyParams widened = params;
  widened.keys = wide.view();
  widened.key_scales = nullptr;
  widened.scale = 0.125F * 0.0625F;
  EXPECT_EQ(Run(params), Run(widened));
}

std::string Name(const ::testing::TestParamInfo<Case>& instance) {
  const Shape& s = std::get<2>(instance.param);
  const auto number = [](int64_t n) { return std::to_string(n); };
  return std::get<0>(instance.param) + "_" + TypesName(std::get<1>(instance.param)) + "_q" +
         number(s.query_heads) + "_kv" + number(s.kv_heads) + "_n" + number(s.tokens) + "_d" +
         number(s.dim) + "_w" + number(s.window);
}

INSTANTIATE_TEST_SUITE_P(All, SaliencyFp8Test,
                         Combine(ValuesIn(testing::BackendsUnderTest()), ValuesIn(kTypes),
                                 ValuesIn(kShapes)),
                         Name);

using InputCase = std::tuple<std::string, Types>;

class SaliencyFp8InputTest : public ::testing::TestWithParam<InputCase> {
 protected:
  const std::unique_ptr<Backend> backend_ = testing::MakeBackend(std::get<0>(GetParam()));
  const Types types_ = std::get<1>(GetParam());
  const Shape shape_ = {4, 2, 500, 64, 8};
  std::mt19937_64 random_ = testing::Random(8);
  std::vector<float> out_ = std::vector<float>(shape_.kv_heads * shape_.tokens);
  BadStatistic bad_;

  absl::Status Run(const SaliencyParams& params) {
    return backend_->Saliency(params, out_.data(), &bad_, testing::BackwardsOnThreads);
  }
};

TEST_P(SaliencyFp8InputTest, NamesTheLowestTokenThatIsNotFinite) {
  std::vector<float> values = {std::numeric_limits<float>::quiet_NaN(),
                               -std::numeric_limits<float>::quiet_NaN()};
  if (types_.keys == DType::kF8E5M2) {
    values.push_back(std::numeric_limits<float>::infinity());
    values.push_back(-std::numeric_limits<float>::infinity());
  }
  const std::vector<float> lse(shape_.query_heads * shape_.window, 0.0F);
  for (const float value : values) {
    for (const bool with_lse : {false, true}) {
      for (const int64_t token : {0, 1, 239, 491, 499}) {
        SCOPED_TRACE(::testing::Message() << value << " at " << token << " lse " << with_lse);
        Inputs inputs(shape_, types_, Layout::kHeadTokenDim, random_);
        inputs.keys.Set(1, token, 13, value);
        // A later one of the head before does not come first.
        if (token < 499) inputs.keys.Set(0, token + 1, 5, value);
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

TEST_P(SaliencyFp8InputTest, TakesTheScaleOfEachHead) {
  Inputs inputs(shape_, types_, Layout::kHeadTokenDim, random_);
  for (const float scale : {0.3F, -0.2F}) {
    SaliencyParams params = inputs.params();
    params.scale = scale;
    ASSERT_EQ(Run(params), absl::OkStatus());
    ExpectNear(*backend_, out_, testing::Expected(params), params);
    // Without scales keys stand for themselves.
    params.key_scales = nullptr;
    ASSERT_EQ(Run(params), absl::OkStatus());
    ExpectNear(*backend_, out_, testing::Expected(params), params);
  }
}

TEST_P(SaliencyFp8InputTest, RefusesScalesAndQueriesThatMakeNoSense) {
  Inputs inputs(shape_, types_, Layout::kHeadTokenDim, random_);
  for (const float scale : {0.0F, -1.0F, std::numeric_limits<float>::quiet_NaN(),
                            std::numeric_limits<float>::infinity(), 3e38F}) {
    inputs.key_scales[1] = scale;
    SaliencyParams params = inputs.params();
    params.scale = 2.0F;
    const absl::Status status = Run(params);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << scale;
    EXPECT_THAT(std::string(status.message()), HasSubstr("key_scales: kv head 1"));
  }
  Inputs narrow(shape_, Types{types_.keys, types_.keys}, Layout::kHeadTokenDim, random_);
  const absl::Status status = Run(narrow.params());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("queries: dtype " + std::string(DTypeName(types_.keys)) +
                        ", must be f32, f16 or bf16"));
}

INSTANTIATE_TEST_SUITE_P(All, SaliencyFp8InputTest,
                         Combine(ValuesIn(testing::BackendsUnderTest()), ValuesIn(kTypes)),
                         [](const ::testing::TestParamInfo<InputCase>& instance) {
                           return std::get<0>(instance.param) + "_" +
                                  TypesName(std::get<1>(instance.param));
                         });

}  // namespace
}  // namespace structkv
