#include "tests/testing/prompt_cases.h"

#include <google/protobuf/text_format.h>

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "tests/testing/prompt_data.h"

namespace structkv::testkit {
namespace {

struct CaseText {
  const char* name;
  const char* open;  // what differs from SmallOpen()
};

constexpr CaseText kCases[] = {
    {"StructKv", ""},
    {"StructKvEverythingReturned", "return_saliency: true return_centrality: true"},
    {"StructKvF32OtherLayout",
     "dtype: DTYPE_F32 layout: LAYOUT_TOKEN_HEAD_DIM return_saliency: true"},
    {"StructKvPerKvHead",
     "dtype: DTYPE_F16 layout: LAYOUT_TOKEN_HEAD_DIM return_saliency: true return_centrality: true "
     "method { structkv { granularity: GRANULARITY_PER_KV_HEAD window_tokens: 5 "
     "kv_budget { ratio: 0.15 kind: BUDGET_KIND_WINDOW_ON_TOP } } }"},
    {"StructKvLse", "window_lse: true"},
    {"StructKvPooled",
     "method { structkv { pooling: POOLING_MAX pooling_kernel: 7 decay: 0.5 "
     "skeleton_budget { ratio: 0.3 kind: BUDGET_KIND_WINDOW_ON_TOP } } }"},
    {"StructKvPivotOfOwnWeights",
     "geometry { layer_count: 9 } prompt_tokens: 90 return_centrality: true method { structkv { "
     "pivot { "
     "sparsity_ratio: 0.3 entropy_weight: 1 sparsity_weight: 0 variance_weight: 0.1 search_begin: "
     "0.1 "
     "search_end: 1 } } }"},
    {"StructKvFixed",
     "return_centrality: true method { structkv { pivot { mode: PIVOT_MODE_FIXED fixed_layer: 2 } "
     "} }"},
    {"StructKvFixedFirst",
     "method { structkv { decay: 0 pivot { mode: PIVOT_MODE_FIXED fixed_layer: 0 } } }"},
    {"StructKvFixedLast",
     "method { structkv { decay: 1 pivot { mode: PIVOT_MODE_FIXED fixed_layer: 3 } } }"},
    {"StructKvSaliency",
     "statistic: STATISTIC_SALIENCY return_saliency: true return_centrality: true"},
    {"StructKvSaliencyPerKvHead",
     "statistic: STATISTIC_SALIENCY_PER_KV_HEAD return_saliency: true"},
    {"StructKvSaliencyPerKvHeadEach",
     "statistic: STATISTIC_SALIENCY_PER_KV_HEAD return_saliency: true "
     "method { structkv { granularity: GRANULARITY_PER_KV_HEAD pooling: POOLING_MAX } }"},
    {"StructKvWindowMax",
     "return_saliency: true return_centrality: true "
     "method { structkv { window_reduce: WINDOW_REDUCE_MAX } }"},
    {"SnapKvWindowSumGroupMean",
     "return_saliency: true method { snapkv { window_reduce: WINDOW_REDUCE_SUM "
     "group_reduce: GROUP_REDUCE_MEAN } }"},
    {"SnapKvWindowAndGroupMaxLse",
     "return_saliency: true window_lse: true method { snapkv { "
     "window_reduce: WINDOW_REDUCE_MAX group_reduce: GROUP_REDUCE_MAX } }"},
    {"StructKvWindowMaxOfOneHeadEach",
     "geometry { query_head_count: 8 kv_head_count: 8 } return_saliency: true "
     "method { structkv { window_reduce: WINDOW_REDUCE_MAX window_tokens: 37 } }"},
    {"StructKvPlan", "output: OUTPUT_PLAN"},
    {"StructKvPlanSaliency",
     "output: OUTPUT_PLAN statistic: STATISTIC_SALIENCY return_centrality: true"},
    {"StructKvOneKvHead",
     "geometry { kv_head_count: 1 value_dim: 64 } return_saliency: true "
     "method { structkv { granularity: GRANULARITY_PER_KV_HEAD } }"},
    {"StructKvOneKvHeadSaliency",
     "geometry { kv_head_count: 1 } statistic: STATISTIC_SALIENCY return_saliency: true "
     "method { structkv { granularity: GRANULARITY_PER_KV_HEAD } }"},
    {"StructKvLatent",
     "geometry { layer_count: 3 kv_head_count: 1 key_dim: 576 value_dim: 512 } prompt_tokens: 70"},
    {"StructKvValuesInKeys",
     "geometry { layer_count: 3 kv_head_count: 1 key_dim: 576 value_dim: 512 values_in_keys: true "
     "} "
     "prompt_tokens: 70 attention_scale: 0.07216878364870322 return_saliency: true"},
    {"SnapKvValuesInKeysOfSeveralHeads",
     "geometry { key_dim: 64 value_dim: 32 values_in_keys: true } layout: LAYOUT_TOKEN_HEAD_DIM "
     "attention_scale: 0.5 method { snapkv {} }"},
    {"StructKvFp8", "dtype: DTYPE_F8_E4M3 kv_scales: KV_SCALES_PER_KV_HEAD return_saliency: true"},
    {"SnapKvFp8",
     "dtype: DTYPE_F8_E5M2 kv_scales: KV_SCALES_PER_TENSOR layout: LAYOUT_TOKEN_HEAD_DIM "
     "query_dtype: DTYPE_F16 method { snapkv { group_reduce: GROUP_REDUCE_MAX } }"},
    {"StructKvPaged",
     "prompt_tokens: 90 return_saliency: true return_centrality: true paged { block_tokens: 16 "
     "block_count: 8 block_table: [ 7, 2, 0, 5, 3, 6 ] }"},
    {"SnapKvPagedTokenFirst",
     "prompt_tokens: 96 layout: LAYOUT_TOKEN_HEAD_DIM dtype: DTYPE_F32 window_lse: true "
     "method { snapkv { group_reduce: GROUP_REDUCE_MAX kv_budget { ratio: 0.5 } } } "
     "paged { block_tokens: 32 block_count: 3 block_table: [ 1, 2, 0 ] }"},
    {"FullPaged",
     "prompt_tokens: 40 method { full {} } "
     "paged { block_tokens: 32 block_count: 2 block_table: [ 1, 0 ] }"},
    {"StructKvOneLayer", "geometry { layer_count: 1 } return_centrality: true"},
    {"StructKvTwoLayers", "geometry { layer_count: 2 } return_centrality: true"},
    {"StructKvOneToken", "prompt_tokens: 1 return_saliency: true return_centrality: true"},
    {"StructKvWithinTheWindow", "prompt_tokens: 5"},
    {"StructKvKeepsAll", "method { structkv { kv_budget { ratio: 1 } } }"},
    {"SnapKv", "method { snapkv {} } return_saliency: true"},
    {"SnapKvPerLayer",
     "layout: LAYOUT_TOKEN_HEAD_DIM method { snapkv { granularity: GRANULARITY_PER_LAYER "
     "pooling: POOLING_MAX window_tokens: 16 } }"},
    {"SnapKvPlan",
     "output: OUTPUT_PLAN statistic: STATISTIC_SALIENCY_PER_KV_HEAD "
     "method { snapkv { pooling: POOLING_NONE kv_budget { ratio: 0.5 } } }"},
    {"StreamingLlm", "method { streaming_llm {} }"},
    {"StreamingLlmPlan", "output: OUTPUT_PLAN method { streaming_llm { sink_tokens: 0 } }"},
    {"StreamingLlmSinksAlone",
     "layout: LAYOUT_TOKEN_HEAD_DIM method { streaming_llm { sink_tokens: 50 } }"},
    {"Full", "method { full {} }"},
    {"FullPlan", "output: OUTPUT_PLAN method { full {} }"},
};

std::vector<PromptCase> Parse() {
  std::vector<PromptCase> cases;
  for (const CaseText& text : kCases) {
    v1::Open open = SmallOpen();
    v1::Open changes;
    if (!google::protobuf::TextFormat::ParseFromString(text.open, &changes)) std::abort();
    open.MergeFrom(changes);
    cases.push_back({text.name, std::move(open)});
  }
  return cases;
}

}  // namespace

const std::vector<PromptCase>& PromptCases() {
  static const auto* const cases = new std::vector<PromptCase>(Parse());
  return *cases;
}

const PromptCase& FindCase(const std::string& name) {
  for (const PromptCase& each : PromptCases()) {
    if (each.name == name) return each;
  }
  std::fprintf(stderr, "no such case: %s\n", name.c_str());
  std::abort();
}

}  // namespace structkv::testkit
