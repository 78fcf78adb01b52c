// Saliency of prompts whose exponentials leave the cache, so that the cpu backend keeps them as
// float16 where it can, against the oracle.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/random_tensor.h"
#include "tests/kernels/saliency_inputs.h"

namespace structkv {
namespace {

using testing::Inputs;
using testing::Shape;
using testing::Types;

const Shape kShapes[] = {
    {4, 1, 70001, 32, 8},   // one block of rows
    {16, 1, 66003, 32, 5},  // several
    {2, 1, 140009, 32, 8},  // half a block
};
const Types kTypes[] = {
    {DType::kBF16, DType::kBF16},
    {DType::kBF16, DType::kF8E4M3},
};

class SaliencyLongTest : public ::testing::TestWithParam<std::string> {
 protected:
  const std::unique_ptr<Backend> backend_ = testing::MakeBackend(GetParam());

  // What the oracle makes of one of a few inputs, which are the same for every backend.
  static const std::vector<float>& ExpectedOnce(const std::string& name,
                                                const SaliencyParams& params) {
    static auto* const known = new std::map<std::string, std::vector<float>>();
    const auto found = known->find(name);
    if (found != known->end()) return found->second;
    return known->emplace(name, testing::Expected(params)).first->second;
  }

  void Check(const std::string& name, const SaliencyParams& params) {
    SCOPED_TRACE(name);
    EXPECT_EQ(backend_->KeepsHalfWeights(params), GetParam() == "cpu_avx3_bf16");
    std::vector<float> out(params.keys.heads * params.keys.tokens);
    ASSERT_EQ(backend_->Saliency(params, out.data(), nullptr, testing::BackwardsOnThreads),
              absl::OkStatus());
    testing::ExpectNear(*backend_, out, ExpectedOnce(name, params), params);
    std::vector<float> again(out.size());
    ASSERT_EQ(backend_->Saliency(params, again.data(), nullptr, SerialFor), absl::OkStatus());
    EXPECT_EQ(out, again);
  }
};

TEST_P(SaliencyLongTest, AgreesWithTheOracle) {
  for (const Types& types : kTypes) {
    for (const Shape& shape : kShapes) {
      std::mt19937_64 random = testing::Random(shape.tokens);
      const Inputs inputs(shape, types, Layout::kHeadTokenDim, random);
      Check(std::string(DTypeName(types.keys)) + std::to_string(shape.tokens), inputs.params());
    }
  }
}

// Over more than a block of rows.
TEST_P(SaliencyLongTest, TakesTheLargestOfTheWindow) {
  const Shape shape = {1, 1, 70001, 32, 37};
  std::mt19937_64 random = testing::Random(13);
  const Inputs inputs(shape, DType::kBF16, Layout::kHeadTokenDim, random);
  Check("largest", testing::WindowMaxOf(inputs.params()));
}

// From one tile of 240 tokens to the next by more than float16's range, and by less.
TEST_P(SaliencyLongTest, FollowsScoresThatRiseOrFall) {
  const Shape& shape = kShapes[0];
  for (const float rise : {100.0F, -100.0F, 8000.0F, -8000.0F}) {
    std::mt19937_64 random = testing::Random(11);
    Inputs inputs(shape, DType::kBF16, Layout::kHeadTokenDim, random);
    for (int64_t h = 0; h < shape.query_heads; ++h) {
      for (int64_t r = 0; r < shape.window; ++r) inputs.queries.Set(h, r, 0, 8.0F);
    }
    for (int64_t j = 0; j < shape.tokens; ++j) {
      inputs.keys.Set(0, j, 0, rise * static_cast<float>(j) / static_cast<float>(shape.tokens));
    }
    SaliencyParams params = inputs.params();
    params.scale = 0.125F;
    Check("rise " + std::to_string(rise), params);
  }
}

TEST_P(SaliencyLongTest, NamesTheTokenThatIsNotFinite) {
  const Shape& shape = kShapes[0];
  std::mt19937_64 random = testing::Random(12);
  for (const int64_t token : {int64_t{300}, int64_t{69992}, int64_t{70000}}) {
    Inputs inputs(shape, DType::kBF16, Layout::kHeadTokenDim, random);
    inputs.keys.Set(0, token, 5, std::numeric_limits<float>::infinity());
    std::vector<float> out(shape.tokens);
    BadStatistic bad;
    EXPECT_EQ(backend_->Saliency(inputs.params(), out.data(), &bad, SerialFor).code(),
              absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(bad.token, token);
    EXPECT_FALSE(std::isfinite(bad.value));
  }
}

std::vector<std::string> CpuBackends() {
  std::vector<std::string> names;
  for (const std::string& name : testing::BackendsUnderTest()) {
    if (name != "reference") names.push_back(name);
  }
  return names;
}

INSTANTIATE_TEST_SUITE_P(All, SaliencyLongTest, ::testing::ValuesIn(CpuBackends()),
                         [](const auto& instance) { return instance.param; });

}  // namespace
}  // namespace structkv
