#include "service/method/layer_metrics.h"

#include <cmath>
#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/backend_registry.h"

namespace structkv::method {
namespace {

LayerMetrics MetricsOf(const std::vector<float>& scores, int64_t top_count) {
  const auto backend = *CreateBackend("reference");
  const auto tokens = static_cast<int64_t>(scores.size());
  return MetricsFromSums(backend->Sums(scores.data(), tokens, top_count, SerialFor), tokens);
}

TEST(LayerMetricsTest, UniformSaliency) {
  const LayerMetrics metrics = MetricsOf(std::vector<float>(100, 0.06F), 10);
  EXPECT_NEAR(metrics.entropy, std::log(100.0), 1e-12);
  EXPECT_NEAR(metrics.sparsity, 0.1, 1e-12);
  EXPECT_NEAR(metrics.variance, 0.0, 1e-12);
}

TEST(LayerMetricsTest, AllOnOneToken) {
  std::vector<float> scores(100, 0.0F);
  scores[42] = 32.0F;
  const LayerMetrics metrics = MetricsOf(scores, 10);
  EXPECT_NEAR(metrics.entropy, 0.0, 1e-12);
  EXPECT_NEAR(metrics.sparsity, 1.0, 1e-12);
  EXPECT_NEAR(metrics.variance, 99.0, 1e-9);
}

// p = 1/2, 1/4, 1/8, 1/8: H = 7/4 ln 2, mass of the first two 3/4, V = 4 * 22/64 - 1.
TEST(LayerMetricsTest, ByHand) {
  const LayerMetrics metrics = MetricsOf({0.125F, 0.5F, 0.125F, 0.25F}, 2);
  EXPECT_NEAR(metrics.entropy, 1.75 * std::log(2.0), 1e-12);
  EXPECT_NEAR(metrics.sparsity, 0.75, 1e-12);
  EXPECT_NEAR(metrics.variance, 0.375, 1e-12);
}

TEST(LayerMetricsTest, ScaleOfTheSaliencyDoesNotMatter) {
  const LayerMetrics small = MetricsOf({1e-20F, 3e-20F, 2e-20F}, 1);
  const LayerMetrics large = MetricsOf({1e20F, 3e20F, 2e20F}, 1);
  EXPECT_NEAR(small.entropy, large.entropy, 1e-6);
  EXPECT_NEAR(small.sparsity, large.sparsity, 1e-6);
  EXPECT_NEAR(small.variance, large.variance, 1e-6);
}

TEST(LayerMetricsTest, OneToken) {
  const LayerMetrics metrics = MetricsOf({6.0F}, 1);
  EXPECT_EQ(metrics.entropy, 0.0);
  EXPECT_EQ(metrics.sparsity, 1.0);
  EXPECT_EQ(metrics.variance, 0.0);
}

}  // namespace
}  // namespace structkv::method
