#include <cmath>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/engine/prompt_spec.h"
#include "tests/engine/llama_spec.h"

namespace structkv::engine {
namespace {

using method::Method;

TEST(FingerprintTest, ThirtyTwoHexadecimalDigits) {
  EXPECT_THAT(Fingerprint(LlamaSpec()), ::testing::MatchesRegex("[0-9a-f]{32}"));
}

// Results are stored under it: a change of the text that it hashes must be meant.
TEST(FingerprintTest, StaysTheSameFromVersionToVersion) {
  EXPECT_EQ(Fingerprint(LlamaSpec()), "618c4ea8884f290b962fc56f954826e4");
  EXPECT_EQ(Fingerprint(LlamaSpec(Method::kFull)), "c5d0b960d06fe979bad9a4d95571d840");
}

TEST(FingerprintTest, EveryParameterCounts) {
  const std::vector<std::function<void(PromptSpec&)>> changes = {
      [](PromptSpec&) {},
      [](PromptSpec& s) { s.geometry.layers = 33; },
      [](PromptSpec& s) { s.geometry.query_heads = 64; },
      [](PromptSpec& s) { s.geometry.kv_heads = 4; },
      [](PromptSpec& s) { s.geometry.key_dim = 64; },
      [](PromptSpec& s) { s.geometry.value_dim = 64; },
      [](PromptSpec& s) { s.geometry.values_in_keys = true; },
      [](PromptSpec& s) { s.attention_scale = 0.25; },
      [](PromptSpec& s) { s.paged = {.block_tokens = 16}; },
      [](PromptSpec& s) { s.paged = {.block_tokens = 32}; },
      [](PromptSpec& s) { s.dtype = DType::kF16; },
      [](PromptSpec& s) { s.dtype = DType::kF8E4M3; },
      [](PromptSpec& s) { s.dtype = DType::kF8E5M2; },
      [](PromptSpec& s) {
        s.dtype = DType::kF8E5M2;
        s.kv_scales = KvScales::kPerTensor;
      },
      [](PromptSpec& s) {
        s.dtype = DType::kF8E5M2;
        s.kv_scales = KvScales::kPerKvHead;
      },
      [](PromptSpec& s) { s.layout = Layout::kTokenHeadDim; },
      [](PromptSpec& s) { s.model_id = "other"; },
      [](PromptSpec& s) { s.method = method::MethodSpec::Defaults(Method::kSnapKv); },
      [](PromptSpec& s) { s.method = method::MethodSpec::Defaults(Method::kStreamingLlm); },
      [](PromptSpec& s) { s.method = method::MethodSpec::Defaults(Method::kFull); },
      [](PromptSpec& s) { s.method.window = 9; },
      [](PromptSpec& s) { s.method.kv_budget.ratio = 0.1000000001; },
      [](PromptSpec& s) { s.method.kv_budget.kind = method::BudgetKind::kWindowOnTop; },
      [](PromptSpec& s) { s.method.granularity = method::Granularity::kPerKvHead; },
      [](PromptSpec& s) { s.method.pooling = Pooling::kAvg; },
      [](PromptSpec& s) { s.method.pooling = Pooling::kMax; },
      [](PromptSpec& s) {
        s.method.pooling = Pooling::kMax;
        s.method.pooling_kernel = 7;
      },
      [](PromptSpec& s) { s.method.decay = 0.8; },
      [](PromptSpec& s) { s.method.skeleton_budget.ratio = 0.3; },
      [](PromptSpec& s) { s.method.skeleton_budget.kind = method::BudgetKind::kWindowOnTop; },
      [](PromptSpec& s) { s.method.pivot.mode = method::PivotMode::kFixed; },
      [](PromptSpec& s) {
        s.method.pivot.mode = method::PivotMode::kFixed;
        s.method.pivot.fixed_layer = 3;
      },
      [](PromptSpec& s) { s.method.pivot.mode = method::PivotMode::kOnline; },
      [](PromptSpec& s) {
        s.method.pivot.mode = method::PivotMode::kOnline;
        s.method.pivot.patience = 3;
      },
      [](PromptSpec& s) {
        s.method.pivot.mode = method::PivotMode::kOnline;
        s.method.pivot.deadline = 0.5;
      },
      [](PromptSpec& s) {
        s.method.pivot.mode = method::PivotMode::kOnline;
        s.method.pivot.confirm_score = 0.25;
      },
      [](PromptSpec& s) { s.method.pivot.mode = method::PivotMode::kProfiled; },
      [](PromptSpec& s) {
        s.method.pivot.mode = method::PivotMode::kProfiled;
        s.method.pivot.profile_min_prompts = 3;
      },
      [](PromptSpec& s) { s.method.pivot.sparsity_ratio = 0.2; },
      [](PromptSpec& s) { s.method.pivot.entropy_weight = 0.3; },
      [](PromptSpec& s) { s.method.pivot.sparsity_weight = 0.2; },
      [](PromptSpec& s) { s.method.pivot.variance_weight = 0.4; },
      [](PromptSpec& s) { s.method.pivot.search_begin = 0.2; },
      [](PromptSpec& s) { s.method.pivot.search_end = 0.8; },
      [](PromptSpec& s) { s.method.kv_budget.kind = method::BudgetKind::kKvpress; },
      [](PromptSpec& s) { s.method.window_reduce = method::WindowReduce::kSum; },
      [](PromptSpec& s) { s.method.window_reduce = method::WindowReduce::kMax; },
      [](PromptSpec& s) { s.method.group_reduce = method::GroupReduce::kMean; },
      [](PromptSpec& s) { s.method.group_reduce = method::GroupReduce::kMax; },
      [](PromptSpec& s) { s.method = method::MethodSpec::Defaults(Method::kPyramidKv); },
      [](PromptSpec& s) {
        s.method = method::MethodSpec::Defaults(Method::kPyramidKv);
        s.method.beta = 10;
      },
      [](PromptSpec& s) { s.method = method::MethodSpec::Defaults(Method::kFastKv); },
      [](PromptSpec& s) {
        s.method = method::MethodSpec::Defaults(Method::kFastKv);
        s.method.tsp_layer = 15;
      },
      [](PromptSpec& s) {
        s.method = method::MethodSpec::Defaults(Method::kFastKv);
        s.method.skeleton_budget.ratio = 0.3;
      },
      [](PromptSpec& s) { s.method = method::MethodSpec::Defaults(Method::kGemFilter); },
      [](PromptSpec& s) {
        s.method = method::MethodSpec::Defaults(Method::kGemFilter);
        s.method.filter_layer = 13;
      },
      [](PromptSpec& s) { s.method = method::MethodSpec::Defaults(Method::kH2o); },
      [](PromptSpec& s) {
        s.method = method::MethodSpec::Defaults(Method::kH2o);
        s.method.recent_share = 0.25;
      },
  };
  std::set<std::string> seen;
  for (size_t i = 0; i < changes.size(); ++i) {
    PromptSpec spec = LlamaSpec();
    changes[i](spec);
    EXPECT_TRUE(seen.insert(Fingerprint(spec)).second) << "change " << i;
  }
}

TEST(FingerprintTest, WhatDoesNotChangeTheMethodDoesNotCount) {
  const std::vector<std::function<void(PromptSpec&)>> changes = {
      [](PromptSpec& s) { s.prompt_tokens = 1000; },
      [](PromptSpec& s) { s.plan_only = true; },
      [](PromptSpec& s) { s.return_saliency = true; },
      [](PromptSpec& s) { s.query_dtype = DType::kF32; },
      [](PromptSpec& s) { s.return_centrality = true; },
      [](PromptSpec& s) { s.statistic = Statistic::kSaliency; },
      [](PromptSpec& s) { s.attention_scale = 1 / std::sqrt(128.0); },  // the default
      [](PromptSpec& s) {
        s.statistic = Statistic::kSaliency;  // scaled by the worker
        s.attention_scale = 0.25;
      },
      [](PromptSpec& s) { s.method.pooling_kernel = 7; },     // without pooling
      [](PromptSpec& s) { s.method.sink_tokens = 7; },        // StreamingLLM's
      [](PromptSpec& s) { s.method.pivot.fixed_layer = 7; },  // FIXED's
      [](PromptSpec& s) { s.method.pivot.patience = 7; },     // ONLINE's
      [](PromptSpec& s) { s.method.pivot.profiled_layer = 7; },
      [](PromptSpec& s) { s.method.beta = 7; },            // PyramidKV's
      [](PromptSpec& s) { s.method.tsp_layer = 7; },       // FastKV's
      [](PromptSpec& s) { s.method.filter_layer = 7; },    // GemFilter's
      [](PromptSpec& s) { s.method.recent_share = 0.7; },  // H2O's
  };
  for (size_t i = 0; i < changes.size(); ++i) {
    PromptSpec spec = LlamaSpec();
    changes[i](spec);
    EXPECT_EQ(Fingerprint(spec), Fingerprint(LlamaSpec())) << "change " << i;
  }
}

}  // namespace
}  // namespace structkv::engine
