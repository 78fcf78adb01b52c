// Every field of `open` that the decoder refuses: the error names it, the value and what is
// allowed. Ranges of the spec are engine::ValidateSpec's, and tested there.
#include <cstdint>
#include <ostream>
#include <string>

#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "service/rpc/open_decoder.h"
#include "tests/rpc/open_messages.h"

namespace structkv::rpc {
namespace {

constexpr int64_t kServerLimit = 16 << 20;

// Fields to set in a valid `open`, in protobuf's text form, and the error's text.
struct BadOpen {
  std::string fields;
  std::string text;
};

void PrintTo(const BadOpen& bad, std::ostream* out) { *out << bad.fields.substr(0, 60); }

class BadOpenTest : public ::testing::TestWithParam<BadOpen> {};

TEST_P(BadOpenTest, NamesFieldValueAndLimit) {
  v1::Open open = ValidOpen();
  ASSERT_TRUE(google::protobuf::TextFormat::MergeFromString(GetParam().fields, &open));
  const absl::Status status = DecodeOpen(open, kServerLimit).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(std::string(status.message()), GetParam().text);
}

INSTANTIATE_TEST_SUITE_P(
    Open, BadOpenTest,
    ::testing::Values(
        BadOpen{"geometry { layer_count: 0 }",
                "open.geometry.layer_count is 0; at least 1 is allowed"},
        BadOpen{"dtype: DTYPE_UNSPECIFIED",
                "open.dtype is DTYPE_UNSPECIFIED (0); allowed: "
                "DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_F8_E4M3, DTYPE_F8_E5M2"},
        BadOpen{"dtype: 9",
                "open.dtype is 9; allowed: DTYPE_F32, DTYPE_F16, DTYPE_BF16, "
                "DTYPE_F8_E4M3, DTYPE_F8_E5M2"},
        BadOpen{"dtype: -1",
                "open.dtype is -1; allowed: DTYPE_F32, DTYPE_F16, DTYPE_BF16, "
                "DTYPE_F8_E4M3, DTYPE_F8_E5M2"},
        BadOpen{"query_dtype: 9",
                "open.query_dtype is 9; allowed: DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_F8_E4M3, "
                "DTYPE_F8_E5M2"},
        BadOpen{"kv_scales: 4",
                "open.kv_scales is 4; allowed: KV_SCALES_NONE, KV_SCALES_PER_TENSOR, "
                "KV_SCALES_PER_KV_HEAD"},
        BadOpen{"layout: LAYOUT_UNSPECIFIED",
                "open.layout is LAYOUT_UNSPECIFIED (0); allowed: LAYOUT_HEAD_TOKEN_DIM, "
                "LAYOUT_TOKEN_HEAD_DIM"},
        BadOpen{"layout: 3",
                "open.layout is 3; allowed: LAYOUT_HEAD_TOKEN_DIM, "
                "LAYOUT_TOKEN_HEAD_DIM"},
        BadOpen{"output: 4", "open.output is 4; allowed: OUTPUT_COMPACT, OUTPUT_PLAN, OUTPUT_HOLD"},
        BadOpen{"hold {}",
                "open.hold is set; it needs the output OUTPUT_HOLD, but that is "
                "OUTPUT_UNSPECIFIED (0)"},
        BadOpen{"layers_in_flight: 9",
                "open.layers_in_flight is 9; 1 to layer_count (8) are allowed"},
        BadOpen{"layers_in_flight: 4294967295",
                "open.layers_in_flight is 4294967295; 1 to layer_count (8) are allowed"},
        BadOpen{"max_response_message_bytes: 65535",
                "open.max_response_message_bytes is 65535; 65536 to 16777216 are allowed"},
        BadOpen{"max_response_message_bytes: 16777217",
                "open.max_response_message_bytes is 16777217; 65536 to 16777216 are allowed"},
        BadOpen{"idempotency_key: '" + std::string(129, 'k') + "'",
                "open.idempotency_key is 129 bytes long; at most 128 are allowed"},
        BadOpen{"model_id: '" + std::string(257, 'm') + "'",
                "open.model_id is 257 bytes long; at most 256 are allowed"}));

INSTANTIATE_TEST_SUITE_P(
    Statistic, BadOpenTest,
    ::testing::Values(
        BadOpen{"statistic: 5",
                "open.statistic is 5; allowed: STATISTIC_NONE, "
                "STATISTIC_WINDOW_QUERIES, STATISTIC_SALIENCY, "
                "STATISTIC_SALIENCY_PER_KV_HEAD"},
        BadOpen{"statistic: STATISTIC_NONE",
                "open.statistic is STATISTIC_NONE (1); the method structkv needs statistics"},
        BadOpen{"method { snapkv {} } statistic: STATISTIC_NONE",
                "open.statistic is STATISTIC_NONE (1); the method snapkv needs statistics"},
        BadOpen{"method { streaming_llm {} } statistic: STATISTIC_SALIENCY",
                "open.statistic is STATISTIC_SALIENCY (3); the method streaming_llm takes none"},
        BadOpen{"method { full {} } statistic: STATISTIC_WINDOW_QUERIES",
                "open.statistic is STATISTIC_WINDOW_QUERIES (2); the method full takes none"},
        BadOpen{"window_lse: true statistic: STATISTIC_SALIENCY",
                "open.window_lse is true; it needs the statistic STATISTIC_WINDOW_QUERIES"},
        BadOpen{"window_lse: true method { full {} }",
                "open.window_lse is true; it needs the statistic STATISTIC_WINDOW_QUERIES"}));

INSTANTIATE_TEST_SUITE_P(
    Method, BadOpenTest,
    ::testing::Values(
        BadOpen{"method { structkv { kv_budget { kind: 4 } } }",
                "open.method.structkv.kv_budget.kind is 4; allowed: BUDGET_KIND_INCLUDES_WINDOW, "
                "BUDGET_KIND_WINDOW_ON_TOP, BUDGET_KIND_KVPRESS"},
        BadOpen{"method { structkv { skeleton_budget { kind: -7 } } }",
                "open.method.structkv.skeleton_budget.kind is -7; allowed: "
                "BUDGET_KIND_INCLUDES_WINDOW, BUDGET_KIND_WINDOW_ON_TOP, BUDGET_KIND_KVPRESS"},
        BadOpen{"method { snapkv { granularity: 3 } }",
                "open.method.snapkv.granularity is 3; allowed: GRANULARITY_PER_LAYER, "
                "GRANULARITY_PER_KV_HEAD"},
        BadOpen{"method { snapkv { pooling: 4 } }",
                "open.method.snapkv.pooling is 4; allowed: POOLING_NONE, POOLING_AVG, "
                "POOLING_MAX"},
        BadOpen{"method { structkv { window_tokens: 0 } }",
                "open.method.structkv.window_tokens is 0; at least 1 is allowed"},
        BadOpen{"method { structkv { pooling_kernel: 5 } }",
                "open.method.structkv.pooling_kernel is 5; it is allowed only with a pooling"},
        BadOpen{"method { snapkv { pooling: POOLING_NONE pooling_kernel: 7 } }",
                "open.method.snapkv.pooling_kernel is 7; it is allowed only with a pooling"},
        BadOpen{"method { streaming_llm { kv_budget { kind: BUDGET_KIND_WINDOW_ON_TOP } } }",
                "open.method.streaming_llm.kv_budget.kind is BUDGET_KIND_WINDOW_ON_TOP (2); "
                "allowed: BUDGET_KIND_INCLUDES_WINDOW, BUDGET_KIND_KVPRESS, or unset"},
        BadOpen{"method { structkv { pivot { mode: 5 } } }",
                "open.method.structkv.pivot.mode is 5; allowed: PIVOT_MODE_EXACT, "
                "PIVOT_MODE_FIXED, PIVOT_MODE_ONLINE, PIVOT_MODE_PROFILED"},
        BadOpen{"method { structkv { pivot { patience: 3 } } }",
                "open.method.structkv.pivot.patience is 3; only PIVOT_MODE_ONLINE and "
                "PIVOT_MODE_PROFILED take it"},
        BadOpen{"method { structkv { pivot { deadline: 0.5 } } }",
                "open.method.structkv.pivot.deadline is 0.5; only PIVOT_MODE_ONLINE and "
                "PIVOT_MODE_PROFILED take it"},
        BadOpen{"method { structkv { pivot { confirm_score: 0.5 } } }",
                "open.method.structkv.pivot.confirm_score is 0.5; only PIVOT_MODE_ONLINE and "
                "PIVOT_MODE_PROFILED take it"},
        BadOpen{"method { structkv { pivot { mode: PIVOT_MODE_ONLINE profile_min_prompts: 1 } } }",
                "open.method.structkv.pivot.profile_min_prompts is 1; only PIVOT_MODE_PROFILED "
                "takes it"},
        BadOpen{"method { structkv { pivot { mode: PIVOT_MODE_FIXED } } }",
                "open.method.structkv.pivot.fixed_layer is not set; PIVOT_MODE_FIXED needs it"},
        BadOpen{"method { structkv { pivot { fixed_layer: 0 } } }",
                "open.method.structkv.pivot.fixed_layer is 0; only PIVOT_MODE_FIXED takes it"},
        BadOpen{"method { structkv { pivot { mode: PIVOT_MODE_FIXED fixed_layer: 8 } } }",
                "open.method.structkv.pivot.fixed_layer is 8; 0 to 7 are allowed"},
        BadOpen{"method { snapkv { window_reduce: 4 } }",
                "open.method.snapkv.window_reduce is 4; allowed: WINDOW_REDUCE_MEAN, "
                "WINDOW_REDUCE_SUM, WINDOW_REDUCE_MAX"},
        BadOpen{"method { snapkv { group_reduce: 4 } }",
                "open.method.snapkv.group_reduce is 4; allowed: GROUP_REDUCE_SUM, "
                "GROUP_REDUCE_MEAN, GROUP_REDUCE_MAX"},
        BadOpen{"method { pyramidkv { granularity: 9 } }",
                "open.method.pyramidkv.granularity is 9; allowed: GRANULARITY_PER_LAYER, "
                "GRANULARITY_PER_KV_HEAD"},
        BadOpen{"method { fastkv {} }",
                "open.method.fastkv.tsp_layer is not set; the method needs it"},
        BadOpen{"method { fastkv { tsp_layer: 8 } }",
                "open.method.fastkv.tsp_layer is 8; 0 to 7 are allowed"},
        BadOpen{"method { fastkv { tsp_layer: 1 skeleton_budget { kind: 9 } } }",
                "open.method.fastkv.skeleton_budget.kind is 9; allowed: "
                "BUDGET_KIND_INCLUDES_WINDOW, BUDGET_KIND_WINDOW_ON_TOP, BUDGET_KIND_KVPRESS"},
        BadOpen{"method { gemfilter {} } output: OUTPUT_PLAN",
                "open.method.gemfilter.filter_layer is not set; the method needs it"},
        BadOpen{"method { gemfilter { filter_layer: 4294967295 } } output: OUTPUT_PLAN",
                "open.method.gemfilter.filter_layer is 4294967295; 0 to 7 are allowed"},
        BadOpen{"method { h2o { kv_budget { kind: BUDGET_KIND_WINDOW_ON_TOP } } }",
                "open.method.h2o.kv_budget.kind is BUDGET_KIND_WINDOW_ON_TOP (2); allowed: "
                "BUDGET_KIND_INCLUDES_WINDOW, BUDGET_KIND_KVPRESS, or unset"},
        BadOpen{"method { h2o { granularity: -1 } }",
                "open.method.h2o.granularity is -1; allowed: GRANULARITY_PER_LAYER, "
                "GRANULARITY_PER_KV_HEAD"}));

TEST(DecodeOpenTest, GeometryIsRequired) {
  v1::Open open = ValidOpen();
  open.clear_geometry();
  EXPECT_EQ(std::string(DecodeOpen(open, kServerLimit).status().message()),
            "open.geometry is not set; it is required");
}

}  // namespace
}  // namespace structkv::rpc
