#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/engine/prompt_spec.h"
#include "tests/engine/llama_spec.h"

namespace structkv::engine {
namespace {

using method::Method;
using ::testing::StartsWith;

struct BadSpec {
  std::string text;  // how the error begins
  std::function<void(PromptSpec&)> change;
  Method method = Method::kStructKv;
};

void PrintTo(const BadSpec& bad, std::ostream* out) { *out << bad.text; }

absl::Status Validate(const PromptSpec& spec, const PromptLimits& limits = {}) {
  return ValidateSpec(spec, limits, AllCapabilities());
}

TEST(ValidateSpecTest, DefaultsOfEveryMethodAreValid) {
  for (const Method method :
       {Method::kStructKv, Method::kSnapKv, Method::kStreamingLlm, Method::kFull,
        Method::kPyramidKv, Method::kFastKv, Method::kGemFilter, Method::kH2o}) {
    EXPECT_EQ(Validate(LlamaSpec(method)), absl::OkStatus());
  }
}

TEST(ValidateSpecTest, ExtremesAreValid) {
  PromptSpec spec = LlamaSpec();
  spec.prompt_tokens = 1;
  spec.geometry = {.layers = 1, .query_heads = 1, .kv_heads = 1, .key_dim = 576, .value_dim = 512};
  spec.method.window = 64;
  spec.method.kv_budget.ratio = 1;
  spec.method.decay = 0;
  EXPECT_EQ(Validate(spec), absl::OkStatus());
  spec = LlamaSpec();
  spec.prompt_tokens = 1 << 20;
  spec.geometry = {
      .layers = 512, .query_heads = 1024, .kv_heads = 8, .key_dim = 256, .value_dim = 256};
  EXPECT_EQ(Validate(spec), absl::OkStatus());
}

TEST(ValidateSpecTest, ParametersThatTheMethodDoesNotHaveAreIgnored) {
  PromptSpec spec = LlamaSpec(Method::kFull);
  spec.method.kv_budget.ratio = -1;
  spec.method.window = -1;
  spec.method.pooling_kernel = -1;
  spec.method.decay = -1;
  EXPECT_EQ(Validate(spec), absl::OkStatus());
  spec = LlamaSpec();
  spec.method.pooling_kernel = 4;  // without pooling
  spec.method.sink_tokens = -1;
  EXPECT_EQ(Validate(spec), absl::OkStatus());
}

class ValidateSpecBadTest : public ::testing::TestWithParam<BadSpec> {};

TEST_P(ValidateSpecBadTest, NamesFieldValueAndLimit) {
  PromptSpec spec = LlamaSpec(GetParam().method);
  GetParam().change(spec);
  const absl::Status status = Validate(spec);
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()), StartsWith(GetParam().text));
}

const double kNan = std::nan("");

INSTANTIATE_TEST_SUITE_P(
    Geometry, ValidateSpecBadTest,
    ::testing::Values(
        BadSpec{"open.geometry.layer_count: 0 is out of range [1, 512]",
                [](PromptSpec& s) { s.geometry.layers = 0; }},
        BadSpec{"open.geometry.layer_count: 513 is out of range [1, 512]",
                [](PromptSpec& s) { s.geometry.layers = 513; }},
        BadSpec{"open.geometry.query_head_count: 1025 is out of range [1, 1024]",
                [](PromptSpec& s) { s.geometry.query_heads = 1025; }},
        BadSpec{"open.geometry.kv_head_count: 0 is out of range [1, 1024]",
                [](PromptSpec& s) { s.geometry.kv_heads = 0; }},
        BadSpec{"open.geometry.query_head_count: 30 is not a multiple of kv_head_count, 8",
                [](PromptSpec& s) { s.geometry.query_heads = 30; }},
        BadSpec{"open.geometry.query_head_count: 4 is not a multiple of kv_head_count, 8",
                [](PromptSpec& s) { s.geometry.query_heads = 4; }},
        BadSpec{"open.geometry.key_dim: 100 is not supported; allowed are multiples of 8 in "
                "[32, 256] and 512, 576",
                [](PromptSpec& s) { s.geometry.key_dim = 100; }},
        BadSpec{"open.geometry.value_dim: 0 is not supported",
                [](PromptSpec& s) { s.geometry.value_dim = 0; }},
        BadSpec{"open.geometry.value_dim: 192 is above key_dim, 128, but values_in_keys says",
                [](PromptSpec& s) {
                  s.geometry.value_dim = 192;
                  s.geometry.values_in_keys = true;
                }},
        BadSpec{"open.pull: VALUES, but values_in_keys says that values are a part of the keys",
                [](PromptSpec& s) {
                  s.pull = Pull::kValues;
                  s.geometry.values_in_keys = true;
                }},
        BadSpec{"open.pull: VALUES, but keys and values are paged; it must be NONE",
                [](PromptSpec& s) {
                  s.prompt_tokens = 100;
                  s.pull = Pull::kValues;
                  s.paged = {.block_tokens = 128,
                             .block_count = 1,
                             .block_table = std::make_shared<const std::vector<int32_t>>(1)};
                }},
        BadSpec{"open.attention_scale: 0 is not a finite number above 0 in float32",
                [](PromptSpec& s) { s.attention_scale = 0; }},
        BadSpec{"open.attention_scale: 1e-60 is not a finite number above 0 in float32",
                [](PromptSpec& s) { s.attention_scale = 1e-60; }},
        BadSpec{"open.prompt_tokens: 0 is out of range [1, 1048576]",
                [](PromptSpec& s) { s.prompt_tokens = 0; }},
        BadSpec{"open.prompt_tokens: 1048577 is out of range [1, 1048576]",
                [](PromptSpec& s) { s.prompt_tokens = (1 << 20) + 1; }},
        BadSpec{"open.model_id: 257 bytes; at most 256",
                [](PromptSpec& s) { s.model_id = std::string(257, 'x'); }}));

INSTANTIATE_TEST_SUITE_P(
    Parameters, ValidateSpecBadTest,
    ::testing::Values(
        BadSpec{"open.method.structkv.kv_budget.ratio: 0 is out of range (0, 1]",
                [](PromptSpec& s) { s.method.kv_budget.ratio = 0; }},
        BadSpec{"open.method.structkv.kv_budget.ratio: 1.5 is out of range (0, 1]",
                [](PromptSpec& s) { s.method.kv_budget.ratio = 1.5; }},
        BadSpec{"open.method.snapkv.kv_budget.ratio: nan is out of range (0, 1]",
                [](PromptSpec& s) { s.method.kv_budget.ratio = kNan; }, Method::kSnapKv},
        BadSpec{"open.method.structkv.window_tokens: 0 is out of range [1, 64]",
                [](PromptSpec& s) { s.method.window = 0; }},
        BadSpec{"open.method.snapkv.window_tokens: 65 is out of range [1, 64]",
                [](PromptSpec& s) { s.method.window = 65; }, Method::kSnapKv},
        BadSpec{"open.method.snapkv.pooling_kernel: 4 is not odd",
                [](PromptSpec& s) { s.method.pooling_kernel = 4; }, Method::kSnapKv},
        BadSpec{"open.method.snapkv.pooling_kernel: 65 is out of range [1, 63]",
                [](PromptSpec& s) { s.method.pooling_kernel = 65; }, Method::kSnapKv},
        BadSpec{"open.method.structkv.decay: 1.1 is out of range [0, 1]",
                [](PromptSpec& s) { s.method.decay = 1.1; }},
        BadSpec{"open.method.structkv.decay: nan is out of range [0, 1]",
                [](PromptSpec& s) { s.method.decay = kNan; }},
        BadSpec{"open.method.structkv.skeleton_budget.ratio: -0.1 is out of range (0, 1]",
                [](PromptSpec& s) { s.method.skeleton_budget.ratio = -0.1; }},
        BadSpec{"open.method.streaming_llm.kv_budget.kind: WINDOW_ON_TOP",
                [](PromptSpec& s) { s.method.kv_budget.kind = method::BudgetKind::kWindowOnTop; },
                Method::kStreamingLlm},
        BadSpec{"open.method.streaming_llm.sink_tokens: -1 is out of range [0, 1048576]",
                [](PromptSpec& s) { s.method.sink_tokens = -1; }, Method::kStreamingLlm}));

INSTANTIATE_TEST_SUITE_P(
    Pivot, ValidateSpecBadTest,
    ::testing::Values(
        BadSpec{"open.method.structkv.pivot.fixed_layer: 32 is out of range [0, 31]",
                [](PromptSpec& s) {
                  s.method.pivot.mode = method::PivotMode::kFixed;
                  s.method.pivot.fixed_layer = 32;
                }},
        BadSpec{"open.method.structkv.pivot.patience: 0 is out of range [1, 512]",
                [](PromptSpec& s) {
                  s.method.pivot.mode = method::PivotMode::kOnline;
                  s.method.pivot.patience = 0;
                }},
        BadSpec{"open.method.structkv.pivot.deadline: 1.5 is out of range [0, 1]",
                [](PromptSpec& s) {
                  s.method.pivot.mode = method::PivotMode::kOnline;
                  s.method.pivot.deadline = 1.5;
                }},
        BadSpec{"open.method.structkv.pivot.deadline: 0.2 is below search_begin, 0.25",
                [](PromptSpec& s) {
                  s.method.pivot.mode = method::PivotMode::kOnline;
                  s.method.pivot.deadline = 0.2;
                }},
        BadSpec{"open.method.structkv.pivot.confirm_score: nan is out of range [0, 1]",
                [](PromptSpec& s) {
                  s.method.pivot.mode = method::PivotMode::kOnline;
                  s.method.pivot.confirm_score = kNan;
                }},
        BadSpec{"open.method.structkv.pivot.profile_min_prompts: 0 is out of range [1, 1000000]",
                [](PromptSpec& s) {
                  s.method.pivot.mode = method::PivotMode::kProfiled;
                  s.method.pivot.profile_min_prompts = 0;
                }},
        BadSpec{"open.model_id: is empty; PIVOT_MODE_PROFILED needs",
                [](PromptSpec& s) {
                  s.method.pivot.mode = method::PivotMode::kProfiled;
                  s.model_id.clear();
                }},
        BadSpec{"open.method.structkv.pivot.sparsity_ratio: 0 is out of range (0, 1]",
                [](PromptSpec& s) { s.method.pivot.sparsity_ratio = 0; }},
        BadSpec{"open.method.structkv.pivot.entropy_weight: -1 is not a finite number of 0 or more",
                [](PromptSpec& s) { s.method.pivot.entropy_weight = -1; }},
        BadSpec{"open.method.structkv.pivot.sparsity_weight: nan is not",
                [](PromptSpec& s) { s.method.pivot.sparsity_weight = kNan; }},
        BadSpec{"open.method.structkv.pivot.variance_weight: inf is not",
                [](PromptSpec& s) {
                  s.method.pivot.variance_weight = std::numeric_limits<double>::infinity();
                }},
        BadSpec{"open.method.structkv.pivot.entropy_weight: 0, and so are",
                [](PromptSpec& s) {
                  s.method.pivot.entropy_weight = 0;
                  s.method.pivot.sparsity_weight = 0;
                  s.method.pivot.variance_weight = 0;
                }},
        BadSpec{"open.method.structkv.pivot.search_begin: -0.5 is out of range [0, 1]",
                [](PromptSpec& s) { s.method.pivot.search_begin = -0.5; }},
        BadSpec{"open.method.structkv.pivot.search_begin: 0.8 is above search_end, 0.75",
                [](PromptSpec& s) { s.method.pivot.search_begin = 0.8; }}));

INSTANTIATE_TEST_SUITE_P(
    Statistics, ValidateSpecBadTest,
    ::testing::Values(
        BadSpec{"open.statistic: NONE, but method structkv needs WINDOW_QUERIES",
                [](PromptSpec& s) { s.statistic = Statistic::kNone; }},
        BadSpec{"open.statistic: method full needs none",
                [](PromptSpec& s) { s.statistic = Statistic::kWindowQueries; }, Method::kFull},
        BadSpec{"open.statistic: SALIENCY has one value per token",
                [](PromptSpec& s) { s.statistic = Statistic::kSaliency; }, Method::kSnapKv},
        BadSpec{"open.window_lse: true is allowed with the statistic WINDOW_QUERIES alone",
                [](PromptSpec& s) {
                  s.statistic = Statistic::kSaliency;
                  s.window_lse = true;
                }},
        BadSpec{"open.return_saliency: true, but method streaming_llm",
                [](PromptSpec& s) { s.return_saliency = true; }, Method::kStreamingLlm},
        BadSpec{"open.return_centrality: true, but method snapkv",
                [](PromptSpec& s) { s.return_centrality = true; }, Method::kSnapKv}));

INSTANTIATE_TEST_SUITE_P(
    OtherMethods, ValidateSpecBadTest,
    ::testing::Values(
        BadSpec{"open.method.pyramidkv.beta: 0.99 is not a finite number of 1 or more",
                [](PromptSpec& s) { s.method.beta = 0.99; }, Method::kPyramidKv},
        BadSpec{"open.method.pyramidkv.beta: nan is not",
                [](PromptSpec& s) { s.method.beta = kNan; }, Method::kPyramidKv},
        BadSpec{"open.method.fastkv.tsp_layer: 32 is out of range [0, 31]",
                [](PromptSpec& s) { s.method.tsp_layer = 32; }, Method::kFastKv},
        BadSpec{"open.method.fastkv.skeleton_budget.ratio: 0 is out of range (0, 1]",
                [](PromptSpec& s) { s.method.skeleton_budget.ratio = 0; }, Method::kFastKv},
        BadSpec{"open.statistic: SALIENCY, but fastkv smooths each of 8 KV heads",
                [](PromptSpec& s) {
                  s.statistic = Statistic::kSaliency;
                  s.method.granularity = method::Granularity::kPerLayer;
                },
                Method::kFastKv},
        BadSpec{"open.method.gemfilter.filter_layer: -1 is out of range [0, 31]",
                [](PromptSpec& s) { s.method.filter_layer = -1; }, Method::kGemFilter},
        BadSpec{"open.output: COMPACT, but gemfilter prefills again",
                [](PromptSpec& s) { s.plan_only = false; }, Method::kGemFilter},
        BadSpec{"open.return_centrality: true, but method gemfilter",
                [](PromptSpec& s) { s.return_centrality = true; }, Method::kGemFilter},
        BadSpec{"open.statistic: WINDOW_QUERIES, but h2o needs the attention of all queries",
                [](PromptSpec& s) { s.statistic = Statistic::kWindowQueries; }, Method::kH2o},
        BadSpec{"open.statistic: SALIENCY has one value per token",
                [](PromptSpec& s) { s.statistic = Statistic::kSaliency; }, Method::kH2o},
        BadSpec{"open.method.h2o.recent_share: 1.01 is out of range [0, 1]",
                [](PromptSpec& s) { s.method.recent_share = 1.01; }, Method::kH2o},
        BadSpec{"open.method.h2o.kv_budget.kind: WINDOW_ON_TOP is not allowed",
                [](PromptSpec& s) { s.method.kv_budget.kind = method::BudgetKind::kWindowOnTop; },
                Method::kH2o},
        BadSpec{"open.method.structkv.window_reduce: SUM needs the statistic WINDOW_QUERIES",
                [](PromptSpec& s) {
                  s.statistic = Statistic::kSaliency;
                  s.method.window_reduce = method::WindowReduce::kSum;
                }},
        BadSpec{"open.method.snapkv.window_reduce: MAX needs the statistic WINDOW_QUERIES",
                [](PromptSpec& s) {
                  s.statistic = Statistic::kSaliencyPerKvHead;
                  s.method.window_reduce = method::WindowReduce::kMax;
                },
                Method::kSnapKv},
        BadSpec{"open.method.structkv.group_reduce: MAX needs the statistic WINDOW_QUERIES",
                [](PromptSpec& s) {
                  s.statistic = Statistic::kSaliency;
                  s.method.group_reduce = method::GroupReduce::kMax;
                }},
        BadSpec{"open.method.fastkv.group_reduce: MEAN needs the statistic WINDOW_QUERIES",
                [](PromptSpec& s) {
                  s.statistic = Statistic::kSaliencyPerKvHead;
                  s.method.group_reduce = method::GroupReduce::kMean;
                },
                Method::kFastKv}));

TEST(ValidateSpecTest, OneVectorIsEnoughForOneKvHead) {
  PromptSpec spec = LlamaSpec(Method::kSnapKv);
  spec.geometry.kv_heads = 1;
  spec.statistic = Statistic::kSaliency;
  EXPECT_EQ(Validate(spec), absl::OkStatus());
}

TEST(ValidateSpecTest, WhatTheBackendCannotDo) {
  BackendCapabilities capabilities = AllCapabilities();
  capabilities.dtypes = {DType::kF32};
  absl::Status status = ValidateSpec(LlamaSpec(), {}, capabilities);
  EXPECT_THAT(std::string(status.message()), StartsWith("open.dtype: bf16 is not supported"));

  capabilities = AllCapabilities();
  capabilities.layouts = {Layout::kTokenHeadDim};
  status = ValidateSpec(LlamaSpec(), {}, capabilities);
  EXPECT_THAT(std::string(status.message()),
              StartsWith("open.layout: head_token_dim is not supported"));

  capabilities = AllCapabilities();
  capabilities.max_window = 16;
  status = ValidateSpec(LlamaSpec(Method::kSnapKv), {}, capabilities);
  EXPECT_THAT(std::string(status.message()),
              StartsWith("open.method.snapkv.window_tokens: 32 is out of range [1, 16]"));
}

// Limits may be set as high as one likes: what passes still fits into int64.
TEST(ValidateSpecTest, SizesDoNotOverflow) {
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  const PromptLimits no_limits{
      .max_prompt_tokens = kHuge, .max_layers = kHuge, .max_heads = kHuge, .max_window = kHuge};
  PromptSpec spec = LlamaSpec();
  spec.prompt_tokens = kHuge;
  EXPECT_THAT(
      std::string(Validate(spec, no_limits).message()),
      StartsWith("open.prompt_tokens: 9223372036854775807 is out of range [1, 2147483647]"));
  spec.prompt_tokens = std::numeric_limits<int32_t>::max();
  EXPECT_EQ(Validate(spec, no_limits), absl::OkStatus());
  spec.geometry.kv_heads = int64_t{1} << 40;
  spec.geometry.query_heads = int64_t{1} << 40;
  EXPECT_THAT(std::string(Validate(spec, no_limits).message()), StartsWith("open.geometry: "));
  spec = LlamaSpec();
  spec.geometry.layers = kHuge;
  EXPECT_THAT(std::string(Validate(spec, no_limits).message()), StartsWith("open.geometry: "));
}

}  // namespace
}  // namespace structkv::engine
