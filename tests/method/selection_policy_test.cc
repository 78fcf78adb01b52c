#include "service/method/selection_policy.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "service/method/budget.h"

namespace structkv::method {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;

class SelectionPolicyTest : public ::testing::Test {
 protected:
  // Runs the policy of `spec` over `heads` score vectors.
  std::vector<int32_t> Run(const MethodSpec& spec, const std::vector<float>& scores, int64_t tokens,
                           int64_t heads = 1, int64_t layer = 0, int64_t layers = 1) {
    const auto policy = MakeSelectionPolicy(spec);
    std::vector<float> scratch(policy->ScratchFloats(tokens, heads));
    std::vector<int32_t> positions(heads * KeptTokens(spec, tokens, layer, layers), -1);
    policy->Select({.tokens = tokens,
                    .heads = heads,
                    .scores = scores.data(),
                    .layer = layer,
                    .layers = layers},
                   *backend_, SerialFor, absl::MakeSpan(scratch), absl::MakeSpan(positions));
    return positions;
  }

  static MethodSpec Spec(Method method, int64_t window, double ratio) {
    MethodSpec spec = MethodSpec::Defaults(method);
    spec.window = window;
    spec.kv_budget.ratio = ratio;
    return spec;
  }

  std::unique_ptr<Backend> backend_ = *CreateBackend("reference");
};

TEST_F(SelectionPolicyTest, SaysWhatItNeeds) {
  EXPECT_EQ(MakeSelectionPolicy(MethodSpec::Defaults(Method::kStructKv))->input(),
            PolicyInput::kSaliency);
  EXPECT_EQ(MakeSelectionPolicy(MethodSpec::Defaults(Method::kSnapKv))->input(),
            PolicyInput::kPerKvHead);
  EXPECT_EQ(MakeSelectionPolicy(MethodSpec::Defaults(Method::kStreamingLlm))->input(),
            PolicyInput::kNothing);
  EXPECT_EQ(MakeSelectionPolicy(MethodSpec::Defaults(Method::kFull))->input(),
            PolicyInput::kNothing);
  EXPECT_EQ(MakeSelectionPolicy(MethodSpec::Defaults(Method::kGemFilter))->input(),
            PolicyInput::kSaliency);
  for (const Method method : {Method::kPyramidKv, Method::kFastKv, Method::kH2o}) {
    MethodSpec spec = MethodSpec::Defaults(method);
    EXPECT_EQ(MakeSelectionPolicy(spec)->input(), PolicyInput::kPerKvHead);
    spec.granularity = Granularity::kPerLayer;
    EXPECT_EQ(MakeSelectionPolicy(spec)->input(), PolicyInput::kSaliency);
  }
}

TEST_F(SelectionPolicyTest, TheWindowAndTheBestOfTheOthers) {
  const MethodSpec spec = Spec(Method::kStructKv, 2, 0.5);
  EXPECT_THAT(Run(spec, {1, 9, 3, 7, 2, 8, 0, 0, 0, 0}, 10), ElementsAre(1, 3, 5, 8, 9));
}

TEST_F(SelectionPolicyTest, TiesGoToTheLowerPosition) {
  const MethodSpec spec = Spec(Method::kStructKv, 1, 0.5);
  EXPECT_THAT(Run(spec, {0, 5, 1, 5, 1, 5, 1, 9}, 8), ElementsAre(1, 3, 5, 7));
  EXPECT_THAT(Run(spec, {4, 4, 4, 4, 4, 4, 4, 4}, 8), ElementsAre(0, 1, 2, 7));
}

TEST_F(SelectionPolicyTest, TheWindowOnTop) {
  MethodSpec spec = Spec(Method::kStructKv, 2, 0.3);
  spec.kv_budget.kind = BudgetKind::kWindowOnTop;
  EXPECT_THAT(Run(spec, {1, 9, 3, 7, 2, 8, 0, 0, 0, 0}, 10), ElementsAre(1, 3, 5, 8, 9));
}

TEST_F(SelectionPolicyTest, APromptWithinItsWindowIsKeptWhole) {
  const MethodSpec spec = Spec(Method::kSnapKv, 32, 0.1);
  EXPECT_THAT(Run(spec, {1, 2, 3}, 3), ElementsAre(0, 1, 2));
}

// The mean over three: 0 3 6 3 0 | window. Its neighbours join the peak at 2; the window's large
// scores do not lift token 4.
TEST_F(SelectionPolicyTest, MeanSmoothingStopsAtTheWindow) {
  MethodSpec spec = Spec(Method::kSnapKv, 2, 5.0 / 7.0);
  spec.pooling_kernel = 3;
  EXPECT_THAT(Run(spec, {0, 0, 9, 0, 0, 99, 99}, 7), ElementsAre(1, 2, 3, 5, 6));
}

TEST_F(SelectionPolicyTest, MaximumSmoothingStopsAtTheWindow) {
  MethodSpec spec = Spec(Method::kStructKv, 2, 5.0 / 8.0);
  spec.pooling = Pooling::kMax;
  spec.pooling_kernel = 3;
  EXPECT_THAT(Run(spec, {1, 0, 0, 9, 0, 0, 99, 99}, 8), ElementsAre(2, 3, 4, 6, 7));
}

TEST_F(SelectionPolicyTest, WithoutSmoothingTheKernelSizeMeansNothing) {
  MethodSpec spec = Spec(Method::kStructKv, 1, 0.5);
  const std::vector<float> scores = {0, 5, 1, 6, 1, 7, 1, 9};
  const std::vector<int32_t> expected = Run(spec, scores, 8);
  spec.pooling_kernel = 63;
  EXPECT_EQ(Run(spec, scores, 8), expected);
}

TEST_F(SelectionPolicyTest, EachHeadForItself) {
  MethodSpec spec = Spec(Method::kSnapKv, 1, 0.5);
  spec.pooling = Pooling::kNone;
  EXPECT_THAT(Run(spec, {9, 0, 8, 0, 7, 0, 0, 6, 0, 5, 0, 0}, 6, 2), ElementsAre(0, 2, 5, 1, 3, 5));
}

TEST_F(SelectionPolicyTest, StreamingLlmKeepsTheFirstAndTheLast) {
  MethodSpec spec = MethodSpec::Defaults(Method::kStreamingLlm);
  spec.kv_budget.ratio = 0.6;
  EXPECT_THAT(Run(spec, {}, 10), ElementsAre(0, 1, 2, 3, 8, 9));
  EXPECT_THAT(Run(spec, {}, 3), ElementsAre(0, 1, 2));
  spec.sink_tokens = 0;
  EXPECT_THAT(Run(spec, {}, 5), ElementsAre(2, 3, 4));
  spec.sink_tokens = 100;
  EXPECT_THAT(Run(spec, {}, 5), ElementsAre(0, 1, 2, 3, 4));
}

TEST_F(SelectionPolicyTest, FullKeepsEverything) {
  EXPECT_THAT(Run(MethodSpec::Defaults(Method::kFull), {}, 4), ElementsAre(0, 1, 2, 3));
}

// k = 5 of 10, w = 1, m = 4, beta 4: 7 and 1 beside the window.
TEST_F(SelectionPolicyTest, PyramidKvKeepsMoreInTheFirstLayers) {
  MethodSpec spec = Spec(Method::kPyramidKv, 1, 0.5);
  spec.pooling = Pooling::kNone;
  spec.granularity = Granularity::kPerLayer;
  spec.beta = 4;
  const std::vector<float> scores = {1, 9, 3, 7, 2, 8, 4, 5, 6, 0};
  EXPECT_THAT(Run(spec, scores, 10, 1, 0, 2), ElementsAre(1, 2, 3, 5, 6, 7, 8, 9));
  EXPECT_THAT(Run(spec, scores, 10, 1, 1, 2), ElementsAre(1, 9));
}

// The maximum over three: 9 9 9 2 5 5 | window, each head for itself.
TEST_F(SelectionPolicyTest, FastKvSmoothsByTheMaximum) {
  MethodSpec spec = Spec(Method::kFastKv, 1, 4.0 / 7.0);
  spec.pooling_kernel = 3;
  EXPECT_THAT(Run(spec, {0, 9, 0, 0, 2, 5, 1, 5, 0, 2, 0, 0, 9, 1}, 7, 2),
              ElementsAre(0, 1, 2, 6, 0, 4, 5, 6));
}

TEST_F(SelectionPolicyTest, GemFilterSelectsInItsLayerAlone) {
  MethodSpec spec = Spec(Method::kGemFilter, 1, 0.5);
  spec.pooling = Pooling::kNone;
  spec.filter_layer = 1;
  const std::vector<float> scores = {1, 9, 3, 7, 2, 0};
  EXPECT_THAT(Run(spec, scores, 6, 1, 0, 3), ElementsAre());
  EXPECT_THAT(Run(spec, scores, 6, 1, 1, 3), ElementsAre(1, 3, 5));
  EXPECT_THAT(Run(spec, scores, 6, 1, 2, 3), ElementsAre());
}

// Half of five is two: the latest two, and the best three of the others.
TEST_F(SelectionPolicyTest, H2oKeepsTheLatestAndTheHeavyHitters) {
  MethodSpec spec = MethodSpec::Defaults(Method::kH2o);
  spec.kv_budget.ratio = 0.5;
  const std::vector<float> scores = {9, 1, 8, 7, 2, 3, 1, 6, 0, 0};
  EXPECT_THAT(Run(spec, scores, 10), ElementsAre(0, 2, 3, 8, 9));
  spec.recent_share = 1;
  EXPECT_THAT(Run(spec, scores, 10), ElementsAre(5, 6, 7, 8, 9));
  spec.recent_share = 0;
  EXPECT_THAT(Run(spec, scores, 10), ElementsAre(0, 2, 3, 5, 7));
}

// Against sorting by (score, position), over methods, poolings, kinds and lengths.
TEST_F(SelectionPolicyTest, AscendingExactAndBest) {
  std::mt19937 random(7);
  std::uniform_int_distribution<int> few_values(0, 9);
  for (const Method method : {Method::kStructKv, Method::kSnapKv}) {
    for (const BudgetKind kind : {BudgetKind::kIncludesWindow, BudgetKind::kWindowOnTop}) {
      for (int64_t tokens : {1, 2, 7, 8, 9, 33, 100}) {
        MethodSpec spec = Spec(method, 8, 0.25);
        spec.kv_budget.kind = kind;
        spec.pooling = Pooling::kNone;
        std::vector<float> scores(tokens);
        for (float& score : scores) score = static_cast<float>(few_values(random));
        const int64_t window = WindowRows(spec, tokens);
        std::vector<int32_t> order(tokens - window);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
        order.resize(KeptTokens(spec, tokens) - window);
        for (int64_t j = tokens - window; j < tokens; ++j) order.push_back(static_cast<int32_t>(j));
        std::sort(order.begin(), order.end());
        EXPECT_THAT(Run(spec, scores, tokens), ElementsAreArray(order)) << tokens;
      }
    }
  }
}

}  // namespace
}  // namespace structkv::method
