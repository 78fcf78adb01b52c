#include "service/engine/prompt_spec.h"

#include <memory>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "tests/engine/llama_spec.h"

namespace structkv::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr int64_t kMiB = int64_t{1} << 20;

TEST(PromptSpecTest, CountsFollowFromTheMethod) {
  const PromptSpec spec = LlamaSpec();
  EXPECT_EQ(spec.geometry.group(), 4);
  EXPECT_EQ(spec.window_rows(), 8);
  EXPECT_EQ(spec.kept_tokens(0), 13108);
  EXPECT_EQ(spec.kept_tokens(31), 13108);
  EXPECT_EQ(spec.skeleton_tokens(), 26215);
  EXPECT_FALSE(spec.per_kv_head());
  EXPECT_TRUE(LlamaSpec(method::Method::kSnapKv).per_kv_head());
}

TEST(PromptSpecTest, MethodsWithoutStatisticsHaveOneSetOfPositions) {
  PromptSpec spec = LlamaSpec(method::Method::kStreamingLlm);
  spec.method.granularity = method::Granularity::kPerKvHead;  // has no meaning here
  EXPECT_FALSE(spec.per_kv_head());
  EXPECT_EQ(spec.window_rows(), 0);
  EXPECT_EQ(spec.skeleton_tokens(), 0);
}

TEST(PromptSpecTest, InputSizes) {
  PromptSpec spec = LlamaSpec();
  EXPECT_EQ(spec.InputBytes(InputTensor::kKeys), 256 * kMiB);
  EXPECT_EQ(spec.InputBytes(InputTensor::kValues), 256 * kMiB);
  EXPECT_EQ(spec.InputBytes(InputTensor::kWindowQueries), 32 * 8 * 128 * 2);
  EXPECT_EQ(spec.InputBytes(InputTensor::kWindowLse), 0);
  EXPECT_EQ(spec.InputBytes(InputTensor::kSaliency), 0);
  EXPECT_THAT(spec.RequiredTensors(),
              ElementsAre(InputTensor::kKeys, InputTensor::kValues, InputTensor::kWindowQueries));
  spec.window_lse = true;
  EXPECT_EQ(spec.InputBytes(InputTensor::kWindowLse), 32 * 8 * 4);
  spec.prompt_tokens = 3;  // its own window
  EXPECT_EQ(spec.InputBytes(InputTensor::kWindowQueries), 32 * 3 * 128 * 2);
}

TEST(PromptSpecTest, InputSizesOfGivenSaliency) {
  PromptSpec spec = LlamaSpec();
  spec.statistic = Statistic::kSaliency;
  EXPECT_EQ(spec.InputBytes(InputTensor::kSaliency), 131072 * 4);
  EXPECT_EQ(spec.InputBytes(InputTensor::kWindowQueries), 0);
  spec.statistic = Statistic::kSaliencyPerKvHead;
  EXPECT_EQ(spec.InputBytes(InputTensor::kSaliency), 8 * 131072 * 4);
}

TEST(PromptSpecTest, ValuesThatArePartOfTheKeysAreNotSent) {
  PromptSpec spec = LlamaSpec();
  spec.geometry.values_in_keys = true;
  EXPECT_EQ(spec.InputBytes(InputTensor::kKeys), 256 * kMiB);
  EXPECT_EQ(spec.InputBytes(InputTensor::kValues), 0);
  EXPECT_EQ(spec.SkeletonInputBytes(InputTensor::kValues), 0);
  EXPECT_THAT(spec.RequiredTensors(), ElementsAre(InputTensor::kKeys, InputTensor::kWindowQueries));
  const auto backend = *CreateBackend("reference");
  EXPECT_EQ(PlanMemory(spec, *backend).layer_output_bytes, 13108 * (4 + 8 * 128 * 2));
}

TEST(PromptSpecTest, Fp8HasQueriesOfAnotherTypeAndScales) {
  PromptSpec spec = LlamaSpec();
  spec.dtype = DType::kF8E4M3;
  EXPECT_EQ(spec.queries(), DType::kBF16);
  EXPECT_EQ(spec.InputBytes(InputTensor::kKeys), 128 * kMiB);
  EXPECT_EQ(spec.InputBytes(InputTensor::kWindowQueries), 32 * 8 * 128 * 2);
  EXPECT_EQ(spec.InputBytes(InputTensor::kKeyScales), 0);
  spec.query_dtype = DType::kF32;
  EXPECT_EQ(spec.InputBytes(InputTensor::kWindowQueries), 32 * 8 * 128 * 4);
  spec.kv_scales = KvScales::kPerTensor;
  EXPECT_EQ(spec.InputBytes(InputTensor::kKeyScales), 4);
  spec.kv_scales = KvScales::kPerKvHead;
  EXPECT_EQ(spec.InputBytes(InputTensor::kKeyScales), 8 * 4);
  EXPECT_EQ(spec.SkeletonInputBytes(InputTensor::kValueScales), 8 * 4);
  EXPECT_THAT(spec.RequiredTensors(),
              ElementsAre(InputTensor::kKeys, InputTensor::kValues, InputTensor::kWindowQueries,
                          InputTensor::kKeyScales, InputTensor::kValueScales));
  const auto backend = *CreateBackend("reference");
  EXPECT_EQ(PlanMemory(spec, *backend).layer_output_bytes, 13108 * (4 + 8 * 256) + 2 * 32);
  spec.geometry.values_in_keys = true;
  EXPECT_EQ(spec.InputBytes(InputTensor::kValueScales), 0) << "they are the keys'";
  spec.plan_only = true;
  EXPECT_THAT(spec.RequiredTensors(), ElementsAre(InputTensor::kKeys, InputTensor::kWindowQueries,
                                                  InputTensor::kKeyScales));
  spec.statistic = Statistic::kSaliency;
  EXPECT_THAT(spec.RequiredTensors(), ElementsAre(InputTensor::kSaliency));
}

TEST(PromptSpecTest, PagedTensorsAreWholeBlocks) {
  PromptSpec spec = LlamaSpec();
  spec.prompt_tokens = 1000;
  spec.paged = {.block_tokens = 64,
                .block_count = 20,
                .block_table = std::make_shared<const std::vector<int32_t>>(16)};
  constexpr int64_t kBlock = 64 * 8 * 128 * 2;
  EXPECT_EQ(spec.InputBytes(InputTensor::kKeys), 20 * kBlock);
  EXPECT_EQ(spec.SkeletonInputBytes(InputTensor::kValues), 4 * kBlock) << "200 tokens";
  EXPECT_EQ(spec.kv_slots(100), 128);
  EXPECT_EQ(spec.kv_blocks(), 2);
  const auto backend = *CreateBackend("reference");
  const MemoryPlan plan = PlanMemory(spec, *backend);
  EXPECT_EQ(plan.layer_output_bytes, 100 * 4 + 2 * 2 * kBlock);
  PromptSpec dense = spec;
  dense.paged.reset();
  EXPECT_EQ(plan.state_bytes - PlanMemory(dense, *backend).state_bytes, 16 * 4) << "the table";
  spec.plan_only = true;
  EXPECT_EQ(spec.kv_blocks(), 0);
}

TEST(PromptSpecTest, APlanNeedsWhatItScoresAlone) {
  PromptSpec spec = LlamaSpec();
  spec.plan_only = true;
  EXPECT_THAT(spec.RequiredTensors(), ElementsAre(InputTensor::kKeys, InputTensor::kWindowQueries));
  spec.statistic = Statistic::kSaliency;
  EXPECT_THAT(spec.RequiredTensors(), ElementsAre(InputTensor::kSaliency));
  spec = LlamaSpec(method::Method::kStreamingLlm);
  spec.plan_only = true;
  EXPECT_THAT(spec.RequiredTensors(), IsEmpty());
}

TEST(PromptSpecTest, TensorNames) {
  EXPECT_EQ(InputTensorName(InputTensor::kKeys), "keys");
  EXPECT_EQ(InputTensorName(InputTensor::kValues), "values");
  EXPECT_EQ(InputTensorName(InputTensor::kWindowQueries), "window_queries");
  EXPECT_EQ(InputTensorName(InputTensor::kWindowLse), "window_lse");
  EXPECT_EQ(InputTensorName(InputTensor::kSaliency), "saliency");
  EXPECT_EQ(InputTensorName(InputTensor::kKeyScales), "key_scales");
  EXPECT_EQ(InputTensorName(InputTensor::kValueScales), "value_scales");
}

TEST(MemoryPlanTest, AddsUp) {
  const std::unique_ptr<Backend> backend = *CreateBackend("reference");
  PromptSpec spec = LlamaSpec();
  MemoryPlan plan = PlanMemory(spec, *backend);
  EXPECT_EQ(plan.layer_input_bytes, 512 * kMiB + 32 * 8 * 128 * 2);
  EXPECT_EQ(plan.layer_output_bytes, 13108 * 4 + 13108 * 8 * 256 * 2);
  // The pivot is layer 25 at most: 26 vectors of centrality, and the skeleton.
  EXPECT_GE(plan.state_bytes, 26 * 131072 * 4 + 26215 * 4);
  EXPECT_LT(plan.state_bytes, 26 * 131072 * 4 + 26215 * 4 + 64 * 1024);
  EXPECT_GE(plan.scratch_bytes, 9 * 131072 * 4);

  spec.return_saliency = true;
  spec.method.granularity = method::Granularity::kPerKvHead;
  plan = PlanMemory(spec, *backend);
  EXPECT_EQ(plan.layer_output_bytes, 8 * 13108 * 4 + 13108 * 8 * 256 * 2 + 8 * 131072 * 4);

  spec.plan_only = true;
  plan = PlanMemory(spec, *backend);
  EXPECT_EQ(plan.layer_output_bytes, 8 * 13108 * 4 + 8 * 131072 * 4);

  spec.method.pivot.mode = method::PivotMode::kFixed;
  spec.method.pivot.fixed_layer = 0;
  EXPECT_LT(PlanMemory(spec, *backend).state_bytes, 2 * 131072 * 4);
}

TEST(MemoryPlanTest, SkeletonRowsNeedNoMoreThanFullLayers) {
  const std::unique_ptr<Backend> backend = *CreateBackend("reference");
  PromptSpec spec = LlamaSpec();
  EXPECT_FALSE(spec.may_have_skeleton_layers());
  const MemoryPlan exact = PlanMemory(spec, *backend);
  spec.method.pivot.mode = method::PivotMode::kOnline;
  EXPECT_TRUE(spec.may_have_skeleton_layers());
  const MemoryPlan online = PlanMemory(spec, *backend);
  EXPECT_EQ(online.layer_input_bytes, exact.layer_input_bytes);
  // Decided with layer 24 at most, and what skeleton rows are held to.
  EXPECT_EQ(online.state_bytes, exact.state_bytes - 131072 * 4 + 26215 * 4);
  EXPECT_EQ(spec.SkeletonInputBytes(InputTensor::kPositions), 26215 * 4);
  EXPECT_EQ(spec.SkeletonInputBytes(InputTensor::kKeys), int64_t{26215} * 8 * 128 * 2);
  EXPECT_EQ(spec.InputBytes(InputTensor::kPositions), 0);
  EXPECT_EQ(spec.SkeletonInputBytes(InputTensor::kWindowQueries),
            spec.InputBytes(InputTensor::kWindowQueries));
}

TEST(MemoryPlanTest, MethodsWithoutStatisticsTakeNoScratch) {
  const std::unique_ptr<Backend> backend = *CreateBackend("reference");
  for (const auto method : {method::Method::kStreamingLlm, method::Method::kFull}) {
    const MemoryPlan plan = PlanMemory(LlamaSpec(method), *backend);
    EXPECT_EQ(plan.scratch_bytes, 0);
    EXPECT_LE(plan.state_bytes, 1024);
  }
  const MemoryPlan full = PlanMemory(LlamaSpec(method::Method::kFull), *backend);
  EXPECT_EQ(full.layer_output_bytes, full.layer_input_bytes + 131072 * 4);
}

// Layers kept: smoothing takes a copy of the scores.
TEST(MemoryPlanTest, SmoothingTakesScratch) {
  const std::unique_ptr<Backend> backend = *CreateBackend("reference");
  PromptSpec spec = LlamaSpec(method::Method::kSnapKv);
  const int64_t smoothed = PlanMemory(spec, *backend).scratch_bytes;
  spec.method.pooling = Pooling::kNone;
  EXPECT_EQ(smoothed - PlanMemory(spec, *backend).scratch_bytes, 8 * 131072 * 4);
}

}  // namespace
}  // namespace structkv::engine
