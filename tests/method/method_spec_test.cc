#include "service/method/method_spec.h"

#include "gtest/gtest.h"

namespace structkv::method {
namespace {

TEST(MethodSpecTest, NamesAreTheProtosFieldNames) {
  EXPECT_EQ(MethodName(Method::kStructKv), "structkv");
  EXPECT_EQ(MethodName(Method::kSnapKv), "snapkv");
  EXPECT_EQ(MethodName(Method::kStreamingLlm), "streaming_llm");
  EXPECT_EQ(MethodName(Method::kFull), "full");
  EXPECT_EQ(MethodName(Method::kPyramidKv), "pyramidkv");
  EXPECT_EQ(MethodName(Method::kFastKv), "fastkv");
  EXPECT_EQ(MethodName(Method::kGemFilter), "gemfilter");
  EXPECT_EQ(MethodName(Method::kH2o), "h2o");
}

TEST(MethodSpecTest, StructKvDefaults) {
  const MethodSpec spec = MethodSpec::Defaults(Method::kStructKv);
  EXPECT_EQ(spec.window, 8);
  EXPECT_EQ(spec.pooling, Pooling::kNone);
  EXPECT_EQ(spec.granularity, Granularity::kPerLayer);
  EXPECT_EQ(spec.kv_budget.ratio, 0.10);
  EXPECT_EQ(spec.skeleton_budget.ratio, 0.20);
  EXPECT_EQ(spec.decay, 0.9);
  EXPECT_EQ(spec.pivot.mode, PivotMode::kExact);
  EXPECT_TRUE(spec.needs_statistics());
  EXPECT_TRUE(spec.has_skeleton());
}

TEST(MethodSpecTest, SnapKvDefaults) {
  const MethodSpec spec = MethodSpec::Defaults(Method::kSnapKv);
  EXPECT_EQ(spec.window, 32);
  EXPECT_EQ(spec.pooling, Pooling::kAvg);
  EXPECT_EQ(spec.pooling_kernel, 5);
  EXPECT_EQ(spec.granularity, Granularity::kPerKvHead);
  EXPECT_TRUE(spec.needs_statistics());
  EXPECT_FALSE(spec.has_skeleton());
}

TEST(MethodSpecTest, PyramidKvIsSnapKvWithAPyramid) {
  const MethodSpec spec = MethodSpec::Defaults(Method::kPyramidKv);
  EXPECT_EQ(spec.window, 32);
  EXPECT_EQ(spec.pooling, Pooling::kAvg);
  EXPECT_EQ(spec.pooling_kernel, 5);
  EXPECT_EQ(spec.granularity, Granularity::kPerKvHead);
  EXPECT_EQ(spec.beta, 20);
  EXPECT_FALSE(spec.has_skeleton());
}

TEST(MethodSpecTest, FastKvDefaults) {
  MethodSpec spec = MethodSpec::Defaults(Method::kFastKv);
  EXPECT_EQ(spec.window, 8);
  EXPECT_EQ(spec.pooling, Pooling::kMax);
  EXPECT_EQ(spec.pooling_kernel, 7);
  EXPECT_EQ(spec.granularity, Granularity::kPerKvHead);
  EXPECT_EQ(spec.kv_budget.ratio, 0.10);
  EXPECT_EQ(spec.skeleton_budget.ratio, 0.20);
  EXPECT_EQ(spec.group_reduce, GroupReduce::kSum);
  spec.tsp_layer = 15;
  EXPECT_EQ(spec.skeleton_layer(), 15);
  EXPECT_TRUE(spec.has_skeleton());
  EXPECT_FALSE(spec.has_centrality());
}

TEST(MethodSpecTest, GemFilterDefaults) {
  MethodSpec spec = MethodSpec::Defaults(Method::kGemFilter);
  EXPECT_EQ(spec.window, 1);
  EXPECT_EQ(spec.pooling, Pooling::kAvg);
  EXPECT_EQ(spec.pooling_kernel, 5);
  EXPECT_EQ(spec.granularity, Granularity::kPerLayer);
  spec.filter_layer = 13;
  EXPECT_EQ(spec.skeleton_layer(), 13);
  EXPECT_TRUE(spec.has_skeleton());
}

TEST(MethodSpecTest, H2oDefaults) {
  const MethodSpec spec = MethodSpec::Defaults(Method::kH2o);
  EXPECT_EQ(spec.window, 0);
  EXPECT_EQ(spec.pooling, Pooling::kNone);
  EXPECT_EQ(spec.granularity, Granularity::kPerKvHead);
  EXPECT_EQ(spec.recent_share, 0.5);
  EXPECT_TRUE(spec.needs_statistics());
  EXPECT_FALSE(spec.has_skeleton());
}

TEST(MethodSpecTest, MethodsWithoutStatisticsHaveNoWindow) {
  const MethodSpec streaming = MethodSpec::Defaults(Method::kStreamingLlm);
  EXPECT_EQ(streaming.sink_tokens, 4);
  EXPECT_EQ(streaming.window, 0);
  EXPECT_FALSE(streaming.needs_statistics());
  const MethodSpec full = MethodSpec::Defaults(Method::kFull);
  EXPECT_EQ(full.window, 0);
  EXPECT_FALSE(full.needs_statistics());
  EXPECT_FALSE(full.has_skeleton());
}

}  // namespace
}  // namespace structkv::method
