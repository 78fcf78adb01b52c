#include "service/method/pivot_detector.h"

#include <numeric>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace structkv::method {
namespace {

using ::testing::DoubleNear;
using ::testing::Optional;

// Layers whose variance follows `variance`, all else equal.
std::vector<LayerMetrics> WithVariance(const std::vector<double>& variance) {
  std::vector<LayerMetrics> metrics;
  for (const double v : variance) metrics.push_back({.entropy = 1, .sparsity = 0.5, .variance = v});
  return metrics;
}

TEST(PivotDetectorTest, TransitionScoresByHand) {
  // -H: 0, +1, -2 over a largest of 2; rho: +0.1, +0.2; V: +4, -1.
  const std::vector<LayerMetrics> metrics = {{3, 0.5, 1}, {2, 0.6, 5}, {4, 0.8, 4}};
  const auto scores = TransitionScores(metrics, PivotSpec{});
  ASSERT_EQ(scores.size(), 3U);
  EXPECT_EQ(scores[0], std::nullopt);
  EXPECT_THAT(scores[1], Optional(DoubleNear(0.2 * 0.5 + 0.3 * 0.5 + 0.5 * 1.0, 1e-12)));
  EXPECT_THAT(scores[2], Optional(DoubleNear(-0.2 + 0.3 - 0.5 * 0.25, 1e-12)));
}

TEST(PivotDetectorTest, WeightsAreUsed) {
  const std::vector<LayerMetrics> metrics = {{3, 0.5, 1}, {2, 0.6, 5}, {4, 0.8, 4}};
  PivotSpec spec;
  spec.entropy_weight = 1;
  spec.sparsity_weight = 0;
  spec.variance_weight = 0;
  const auto scores = TransitionScores(metrics, spec);
  EXPECT_THAT(scores[1], Optional(DoubleNear(0.5, 1e-12)));
  EXPECT_THAT(scores[2], Optional(DoubleNear(-1.0, 1e-12)));
}

TEST(PivotDetectorTest, FlatMetricsScoreZeroAndTheLowestLayerWins) {
  const std::vector<LayerMetrics> metrics = WithVariance(std::vector<double>(12, 3.0));
  const PivotDecision decision = DecideExact(metrics, PivotSpec{});
  for (size_t l = 1; l < 12; ++l) EXPECT_EQ(decision.layers[l].transition, 0.0);
  EXPECT_EQ(decision.transition_layer, 3);  // ceil(0.25 * 12)
  EXPECT_EQ(decision.pivot_layer, 4);
}

TEST(PivotDetectorTest, TheLayerAfterTheHighestScore) {
  std::vector<double> variance(32, 1.0);
  for (size_t l = 15; l < 32; ++l) variance[l] = 9.0;
  const PivotDecision decision = DecideExact(WithVariance(variance), PivotSpec{});
  EXPECT_EQ(decision.mode, PivotMode::kExact);
  EXPECT_EQ(decision.transition_layer, 15);
  EXPECT_EQ(decision.pivot_layer, 16);
  ASSERT_EQ(decision.layers.size(), 32U);
  EXPECT_EQ(decision.layers[15].layer, 15);
  EXPECT_EQ(decision.layers[15].metrics.variance, 9.0);
  EXPECT_THAT(decision.layers[15].transition, Optional(0.5));
}

TEST(PivotDetectorTest, EqualScoresGoToTheLowerLayer) {
  std::vector<double> variance = {0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2};
  const PivotDecision decision = DecideExact(WithVariance(variance), PivotSpec{});
  EXPECT_EQ(decision.transition_layer, 4);
}

TEST(PivotDetectorTest, JumpsOutsideOfTheSearchRangeDoNotCount) {
  // 12 layers: [3, 9]. The largest jumps are at 1, 2, 10 and 11, a small one at 9.
  std::vector<double> variance = {0, 50, 99, 99, 99, 99, 99, 99, 99, 100, 150, 200};
  const PivotDecision decision = DecideExact(WithVariance(variance), PivotSpec{});
  EXPECT_EQ(decision.transition_layer, 9);
  EXPECT_EQ(decision.pivot_layer, 10);
}

TEST(PivotDetectorTest, ThePivotIsALayer) {
  PivotSpec spec;
  spec.search_begin = 0;
  spec.search_end = 1;
  for (int64_t layers = 1; layers <= 40; ++layers) {
    std::vector<double> variance(layers);
    std::iota(variance.begin(), variance.end(), 0.0);
    variance.back() += 100;  // the best place would be the last layer
    const PivotDecision decision = DecideExact(WithVariance(variance), spec);
    const PivotRange range = PossiblePivots(layers, spec);
    EXPECT_GE(decision.pivot_layer, range.first);
    EXPECT_LE(decision.pivot_layer, range.last);
    EXPECT_LE(range.last, layers - 1);
    EXPECT_EQ(decision.layers.size(), static_cast<size_t>(layers));
  }
}

TEST(PivotDetectorTest, TooFewLayersToSearch) {
  for (int64_t layers = 1; layers <= 2; ++layers) {
    const PivotDecision decision =
        DecideExact(WithVariance(std::vector<double>(layers, 1.0)), PivotSpec{});
    EXPECT_EQ(decision.transition_layer, std::nullopt);
    EXPECT_EQ(decision.pivot_layer, layers - 1);
  }
  const PivotDecision three = DecideExact(WithVariance({1, 2, 3}), PivotSpec{});
  EXPECT_EQ(three.transition_layer, 1);
  EXPECT_EQ(three.pivot_layer, 2);
}

TEST(PivotDetectorTest, SharesThatSpanNoLayerCutNothing) {
  PivotSpec spec;
  spec.search_begin = 0.9;
  spec.search_end = 0.9;
  const PivotDecision decision = DecideExact(WithVariance({1, 2, 3, 4}), spec);
  EXPECT_EQ(decision.transition_layer, std::nullopt);
  EXPECT_EQ(decision.pivot_layer, 3);
}

TEST(PivotDetectorTest, DecimalSharesLoseNoLayer) {
  PivotSpec spec;
  spec.search_begin = 0.3;
  spec.search_end = 0.7;  // 0.7 * 10 is below 7 in binary
  const PivotRange range = PossiblePivots(10, spec);
  EXPECT_EQ(range.first, 4);
  EXPECT_EQ(range.last, 8);
}

TEST(PivotDetectorTest, FixedIsTheGivenLayer) {
  PivotSpec spec;
  spec.mode = PivotMode::kFixed;
  spec.fixed_layer = 2;
  const PivotDecision decision = DecideFixed(WithVariance({1, 2, 9}), spec);
  EXPECT_EQ(decision.mode, PivotMode::kFixed);
  EXPECT_EQ(decision.pivot_layer, 2);
  EXPECT_EQ(decision.transition_layer, std::nullopt);
  ASSERT_EQ(decision.layers.size(), 3U);
  EXPECT_THAT(decision.layers[2].transition, Optional(DoubleNear(0.5, 1e-12)));
  const PivotRange range = PossiblePivots(12, spec);
  EXPECT_EQ(range.first, 2);
  EXPECT_EQ(range.last, 2);
}

}  // namespace
}  // namespace structkv::method
