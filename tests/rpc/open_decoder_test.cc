// `open` to the engine's terms and back: defaults, every value, and what is echoed.
#include "service/rpc/open_decoder.h"

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "service/rpc/method_codec.h"
#include "tests/rpc/open_messages.h"

namespace structkv::rpc {
namespace {

using google::protobuf::TextFormat;
using ::testing::ElementsAre;

constexpr int64_t kServerLimit = 16 << 20;

OpenRequest Decode(const v1::Open& open) {
  absl::StatusOr<OpenRequest> request = DecodeOpen(open, kServerLimit);
  EXPECT_TRUE(request.ok()) << request.status();
  return request.ok() ? *std::move(request) : OpenRequest();
}

OpenRequest DecodeWith(const std::string& fields) {
  v1::Open open = ValidOpen();
  EXPECT_TRUE(TextFormat::MergeFromString(fields, &open)) << fields;
  return Decode(open);
}

TEST(DecodeOpenTest, FillsDefaults) {
  const OpenRequest request = Decode(ValidOpen());
  const engine::PromptSpec& spec = request.spec;
  EXPECT_EQ(spec.geometry.layers, 8);
  EXPECT_EQ(spec.geometry.query_heads, 4);
  EXPECT_EQ(spec.geometry.kv_heads, 2);
  EXPECT_EQ(spec.geometry.key_dim, 64);
  EXPECT_EQ(spec.geometry.value_dim, 64) << "that of the keys";
  EXPECT_EQ(spec.prompt_tokens, 1000);
  EXPECT_EQ(spec.dtype, DType::kBF16);
  EXPECT_EQ(spec.layout, Layout::kHeadTokenDim);
  EXPECT_EQ(spec.statistic, engine::Statistic::kWindowQueries);
  EXPECT_EQ(spec.method.method, method::Method::kStructKv);
  EXPECT_FALSE(spec.window_lse);
  EXPECT_FALSE(spec.plan_only);
  EXPECT_FALSE(spec.return_saliency);
  EXPECT_FALSE(spec.return_centrality);
  EXPECT_EQ(spec.model_id, "");
  EXPECT_EQ(request.layers_in_flight, 2);
  EXPECT_EQ(request.idempotency_key, "");
  EXPECT_EQ(request.max_response_message_bytes, 4 << 20);
}

TEST(DecodeOpenTest, DefaultsKeepWithinTheModelAndTheServer) {
  v1::Open open = ValidOpen();
  open.mutable_geometry()->set_layer_count(1);
  EXPECT_EQ(Decode(open).layers_in_flight, 1);
  const absl::StatusOr<OpenRequest> small = DecodeOpen(ValidOpen(), kMinMessageBytes);
  ASSERT_TRUE(small.ok()) << small.status();
  EXPECT_EQ(small->max_response_message_bytes, kMinMessageBytes);
}

TEST(DecodeOpenTest, TakesEveryFieldAtItsLimit) {
  const std::string key(128, 'k');
  const std::string model(256, 'm');
  const OpenRequest request = DecodeWith(
      "geometry { value_dim: 128 } dtype: DTYPE_F16 layout: LAYOUT_TOKEN_HEAD_DIM "
      "window_lse: true output: OUTPUT_PLAN idempotency_key: '" +
      key + "' model_id: '" + model +
      "' layers_in_flight: 8 return_saliency: true return_centrality: true "
      "max_response_message_bytes: 65536");
  const engine::PromptSpec& spec = request.spec;
  EXPECT_EQ(spec.geometry.value_dim, 128);
  EXPECT_EQ(spec.dtype, DType::kF16);
  EXPECT_EQ(spec.layout, Layout::kTokenHeadDim);
  EXPECT_TRUE(spec.window_lse);
  EXPECT_TRUE(spec.plan_only);
  EXPECT_TRUE(spec.return_saliency);
  EXPECT_TRUE(spec.return_centrality);
  EXPECT_EQ(spec.model_id, model);
  EXPECT_EQ(request.idempotency_key, key);
  EXPECT_EQ(request.layers_in_flight, 8);
  EXPECT_EQ(request.max_response_message_bytes, 65536);
  EXPECT_EQ(DecodeWith("max_response_message_bytes: 16777216").max_response_message_bytes,
            kServerLimit);
}

TEST(DecodeOpenTest, StatisticFollowsTheMethod) {
  using engine::Statistic;
  EXPECT_EQ(DecodeWith("method { snapkv {} }").spec.statistic, Statistic::kWindowQueries);
  EXPECT_EQ(DecodeWith("method { full {} }").spec.statistic, Statistic::kNone);
  EXPECT_EQ(DecodeWith("method { streaming_llm {} } statistic: STATISTIC_NONE").spec.statistic,
            Statistic::kNone);
  EXPECT_EQ(DecodeWith("statistic: STATISTIC_SALIENCY").spec.statistic, Statistic::kSaliency);
  EXPECT_EQ(DecodeWith("statistic: STATISTIC_SALIENCY_PER_KV_HEAD").spec.statistic,
            Statistic::kSaliencyPerKvHead);
}

TEST(DecodeOpenTest, WhatAMethodDoesNotHaveIsNotReturned) {
  const auto asked = [](const std::string& method) {
    return DecodeWith("return_saliency: true return_centrality: true " + method).spec;
  };
  EXPECT_TRUE(asked("method { snapkv {} }").return_saliency);
  EXPECT_FALSE(asked("method { snapkv {} }").return_centrality);
  EXPECT_FALSE(asked("method { full {} }").return_saliency);
  EXPECT_FALSE(asked("method { full {} }").return_centrality);
}

// What a client sets, and what Opened.method then says.
struct Echo {
  std::string sent;
  std::string effective;
};

class EchoTest : public ::testing::TestWithParam<Echo> {};

TEST_P(EchoTest, EveryParameterInForceIsEchoed) {
  v1::Method expected;
  ASSERT_TRUE(TextFormat::ParseFromString(GetParam().effective, &expected));
  const OpenRequest request = DecodeWith("method { " + GetParam().sent + " }");
  EXPECT_EQ(EncodeMethod(request.spec.method).DebugString(), expected.DebugString());
  // What was echoed asks for the same again.
  v1::Open again = ValidOpen();
  *again.mutable_method() = expected;
  EXPECT_EQ(EncodeMethod(Decode(again).spec.method).DebugString(), expected.DebugString());
  EXPECT_EQ(engine::Fingerprint(Decode(again).spec), engine::Fingerprint(request.spec));
}

constexpr char kStructKvDefaults[] =
    "structkv { kv_budget { ratio: 0.1 kind: BUDGET_KIND_INCLUDES_WINDOW } window_tokens: 8 "
    "granularity: GRANULARITY_PER_LAYER pooling: POOLING_NONE "
    "window_reduce: WINDOW_REDUCE_MEAN group_reduce: GROUP_REDUCE_SUM "
    "decay: 0.9 "
    "skeleton_budget { ratio: 0.2 kind: BUDGET_KIND_INCLUDES_WINDOW } "
    "pivot { mode: PIVOT_MODE_EXACT sparsity_ratio: 0.1 entropy_weight: 0.2 "
    "sparsity_weight: 0.3 variance_weight: 0.5 search_begin: 0.25 search_end: 0.75 } }";

constexpr char kStructKvOther[] =
    "structkv { kv_budget { ratio: 0.5 kind: BUDGET_KIND_WINDOW_ON_TOP } window_tokens: 64 "
    "granularity: GRANULARITY_PER_KV_HEAD pooling: POOLING_MAX pooling_kernel: 63 "
    "window_reduce: WINDOW_REDUCE_MAX group_reduce: GROUP_REDUCE_MAX decay: 0 "
    "skeleton_budget { ratio: 1 kind: BUDGET_KIND_WINDOW_ON_TOP } "
    "pivot { mode: PIVOT_MODE_FIXED fixed_layer: 7 sparsity_ratio: 1 entropy_weight: 0 "
    "sparsity_weight: 0 variance_weight: 1 search_begin: 0 search_end: 1 } }";

constexpr char kProfiled[] =
    "structkv { kv_budget { ratio: 0.1 kind: BUDGET_KIND_INCLUDES_WINDOW } window_tokens: 8 "
    "granularity: GRANULARITY_PER_LAYER pooling: POOLING_NONE "
    "window_reduce: WINDOW_REDUCE_MEAN group_reduce: GROUP_REDUCE_SUM decay: 0.9 "
    "skeleton_budget { ratio: 0.2 kind: BUDGET_KIND_INCLUDES_WINDOW } "
    "pivot { mode: PIVOT_MODE_PROFILED sparsity_ratio: 0.1 entropy_weight: 0.2 "
    "sparsity_weight: 0.3 variance_weight: 0.5 search_begin: 0.25 search_end: 0.6 patience: 3 "
    "deadline: 0.6 profile_min_prompts: 8 confirm_score: 0.25 } }";

INSTANTIATE_TEST_SUITE_P(
    Methods, EchoTest,
    ::testing::Values(
        Echo{"", kStructKvDefaults}, Echo{"structkv {}", kStructKvDefaults},
        Echo{kStructKvOther, kStructKvOther},
        Echo{"structkv { pivot { mode: PIVOT_MODE_PROFILED search_end: 0.6 patience: 3 "
             "confirm_score: 0.25 } }",
             kProfiled},
        Echo{"snapkv {}",
             "snapkv { kv_budget { ratio: 0.1 kind: BUDGET_KIND_INCLUDES_WINDOW } "
             "window_tokens: 32 granularity: GRANULARITY_PER_KV_HEAD pooling: POOLING_AVG "
             "pooling_kernel: 5 window_reduce: WINDOW_REDUCE_MEAN "
             "group_reduce: GROUP_REDUCE_SUM }"},
        Echo{"snapkv { window_tokens: 1 granularity: GRANULARITY_PER_LAYER pooling: POOLING_NONE }",
             "snapkv { kv_budget { ratio: 0.1 kind: BUDGET_KIND_INCLUDES_WINDOW } "
             "window_tokens: 1 granularity: GRANULARITY_PER_LAYER pooling: POOLING_NONE "
             "window_reduce: WINDOW_REDUCE_MEAN group_reduce: GROUP_REDUCE_SUM }"},
        Echo{"streaming_llm {}",
             "streaming_llm { kv_budget { ratio: 0.1 kind: BUDGET_KIND_INCLUDES_WINDOW } "
             "sink_tokens: 4 }"},
        Echo{"streaming_llm { kv_budget { ratio: 0.3 } sink_tokens: 0 }",
             "streaming_llm { kv_budget { ratio: 0.3 kind: BUDGET_KIND_INCLUDES_WINDOW } "
             "sink_tokens: 0 }"},
        Echo{"full {}", "full {}"},
        Echo{"pyramidkv {}",
             "pyramidkv { kv_budget { ratio: 0.1 kind: BUDGET_KIND_INCLUDES_WINDOW } "
             "window_tokens: 32 granularity: GRANULARITY_PER_KV_HEAD pooling: POOLING_AVG "
             "pooling_kernel: 5 window_reduce: WINDOW_REDUCE_MEAN "
             "group_reduce: GROUP_REDUCE_SUM beta: 20 }"},
        Echo{"pyramidkv { kv_budget { kind: BUDGET_KIND_KVPRESS } beta: 1.5 "
             "window_reduce: WINDOW_REDUCE_SUM group_reduce: GROUP_REDUCE_MEAN }",
             "pyramidkv { kv_budget { ratio: 0.1 kind: BUDGET_KIND_KVPRESS } "
             "window_tokens: 32 granularity: GRANULARITY_PER_KV_HEAD pooling: POOLING_AVG "
             "pooling_kernel: 5 window_reduce: WINDOW_REDUCE_SUM "
             "group_reduce: GROUP_REDUCE_MEAN beta: 1.5 }"},
        Echo{"fastkv { tsp_layer: 3 }",
             "fastkv { kv_budget { ratio: 0.1 kind: BUDGET_KIND_INCLUDES_WINDOW } "
             "window_tokens: 8 granularity: GRANULARITY_PER_KV_HEAD pooling: POOLING_MAX "
             "pooling_kernel: 7 window_reduce: WINDOW_REDUCE_MEAN "
             "group_reduce: GROUP_REDUCE_SUM tsp_layer: 3 "
             "skeleton_budget { ratio: 0.2 kind: BUDGET_KIND_INCLUDES_WINDOW } }"},
        Echo{"gemfilter { filter_layer: 7 }",
             "gemfilter { kv_budget { ratio: 0.1 kind: BUDGET_KIND_INCLUDES_WINDOW } "
             "window_tokens: 1 pooling: POOLING_AVG pooling_kernel: 5 filter_layer: 7 "
             "window_reduce: WINDOW_REDUCE_MEAN group_reduce: GROUP_REDUCE_SUM }"},
        Echo{"h2o {}",
             "h2o { kv_budget { ratio: 0.1 kind: BUDGET_KIND_INCLUDES_WINDOW } recent_share: 0.5 "
             "granularity: GRANULARITY_PER_KV_HEAD }"},
        Echo{"h2o { recent_share: 0 granularity: GRANULARITY_PER_LAYER }",
             "h2o { kv_budget { ratio: 0.1 kind: BUDGET_KIND_INCLUDES_WINDOW } recent_share: 0 "
             "granularity: GRANULARITY_PER_LAYER }"}));

TEST(DecodeOpenTest, H2oFollowsTheStatistic) {
  EXPECT_EQ(DecodeWith("method { h2o {} }").spec.statistic, engine::Statistic::kSaliencyPerKvHead);
  EXPECT_TRUE(DecodeWith("method { h2o {} }").spec.per_kv_head());
  const OpenRequest summed = DecodeWith("method { h2o {} } statistic: STATISTIC_SALIENCY");
  EXPECT_EQ(summed.spec.statistic, engine::Statistic::kSaliency);
  EXPECT_FALSE(summed.spec.per_kv_head());
}

TEST(EncodeOpenedTest, LayersMayKeepDifferentCounts) {
  const v1::Opened pyramid =
      EncodeOpened(DecodeWith("method { pyramidkv { kv_budget { ratio: 0.06 } window_tokens: 10 "
                              "beta: 5 } } geometry { layer_count: 5 }")
                       .spec);
  EXPECT_THAT(pyramid.kept_tokens(), ElementsAre(100, 80, 60, 40, 20));
  const v1::Opened filter =
      EncodeOpened(DecodeWith("method { gemfilter { filter_layer: 2 } } output: OUTPUT_PLAN").spec);
  EXPECT_THAT(filter.kept_tokens(), ElementsAre(0, 0, 100, 0, 0, 0, 0, 0));
  EXPECT_EQ(filter.skeleton_tokens(), 100);
  EXPECT_THAT(filter.required_tensors(), ElementsAre(v1::TENSOR_KEYS, v1::TENSOR_WINDOW_QUERIES));
}

TEST(EncodeOpenedTest, SaysWhatFollowsFromTheSpec) {
  const engine::PromptSpec spec =
      DecodeWith("window_lse: true model_id: 'llama' method { structkv { window_tokens: 16 } }")
          .spec;
  const v1::Opened opened = EncodeOpened(spec);
  EXPECT_THAT(opened.kept_tokens(), ElementsAre(100, 100, 100, 100, 100, 100, 100, 100));
  EXPECT_EQ(opened.skeleton_tokens(), 200);
  EXPECT_THAT(opened.required_tensors(),
              ElementsAre(v1::TENSOR_KEYS, v1::TENSOR_VALUES, v1::TENSOR_WINDOW_QUERIES,
                          v1::TENSOR_WINDOW_LSE));
  EXPECT_EQ(opened.window_tokens(), 16);
  EXPECT_EQ(opened.statistic(), v1::STATISTIC_WINDOW_QUERIES);
  EXPECT_EQ(opened.fingerprint(), engine::Fingerprint(spec));
  EXPECT_EQ(opened.method().structkv().window_tokens(), 16);
}

TEST(EncodeOpenedTest, NamesEveryStatistic) {
  for (v1::Statistic statistic :
       {v1::STATISTIC_WINDOW_QUERIES, v1::STATISTIC_SALIENCY, v1::STATISTIC_SALIENCY_PER_KV_HEAD}) {
    v1::Open open = ValidOpen();
    open.set_statistic(statistic);
    EXPECT_EQ(EncodeOpened(Decode(open).spec).statistic(), statistic);
  }
  const v1::Opened full = EncodeOpened(DecodeWith("method { full {} } output: OUTPUT_PLAN").spec);
  EXPECT_EQ(full.statistic(), v1::STATISTIC_NONE);
  EXPECT_EQ(full.window_tokens(), 0);
  EXPECT_EQ(full.skeleton_tokens(), 0);
  EXPECT_EQ(full.required_tensors_size(), 0);
}

TEST(EncodePivotTest, CarriesScoresAndTransition) {
  method::PivotDecision decision = {.mode = method::PivotMode::kExact, .pivot_layer = 4};
  decision.transition_layer = 3;
  decision.layers = {{.layer = 0, .metrics = {.entropy = 1, .sparsity = 0.5, .variance = 2}},
                     {.layer = 1, .metrics = {.entropy = 3}, .transition = -0.25}};
  const v1::PivotDecision pivot = EncodePivot(decision);
  EXPECT_EQ(pivot.pivot_layer(), 4);
  EXPECT_EQ(pivot.transition_layer(), 3);
  EXPECT_EQ(pivot.mode(), v1::PIVOT_MODE_EXACT);
  ASSERT_EQ(pivot.layers_size(), 2);
  EXPECT_EQ(pivot.layers(0).sparsity(), 0.5);
  EXPECT_EQ(pivot.layers(0).variance(), 2);
  EXPECT_FALSE(pivot.layers(0).has_transition());
  EXPECT_EQ(pivot.layers(1).layer(), 1);
  EXPECT_EQ(pivot.layers(1).entropy(), 3);
  EXPECT_EQ(pivot.layers(1).transition(), -0.25);
  EXPECT_FALSE(pivot.has_skeleton_from_layer());
  decision = {.mode = method::PivotMode::kProfiled, .pivot_layer = 4, .decided_at_layer = 6};
  decision.skeleton_from_layer = 7;
  decision.profiled_prompts = 9;
  const v1::PivotDecision profiled = EncodePivot(decision);
  EXPECT_EQ(profiled.mode(), v1::PIVOT_MODE_PROFILED);
  EXPECT_EQ(profiled.decided_at_layer(), 6);
  EXPECT_EQ(profiled.skeleton_from_layer(), 7);
  EXPECT_EQ(profiled.profiled_prompts(), 9);
  const v1::PivotDecision fixed = EncodePivot({.mode = method::PivotMode::kFixed});
  EXPECT_EQ(fixed.mode(), v1::PIVOT_MODE_FIXED);
  EXPECT_FALSE(fixed.has_transition_layer());
}

TEST(TensorTest, InputTensorsGoBothWaysAndOthersAreNone) {
  for (int i = 0; i < engine::kInputTensors; ++i) {
    const auto tensor = static_cast<engine::InputTensor>(i);
    EXPECT_EQ(DecodeTensor(EncodeTensor(tensor)), tensor);
    const std::string name(engine::InputTensorName(tensor));
    EXPECT_EQ(absl::AsciiStrToLower(v1::Tensor_Name(EncodeTensor(tensor))), "tensor_" + name);
  }
  for (int tensor : {-1, 0, 7, 8, 11, 1000}) {
    EXPECT_EQ(DecodeTensor(tensor), std::nullopt) << tensor;
  }
}

TEST(EnumTextTest, NamesWhatItKnows) {
  EXPECT_EQ(EnumText(v1::DTYPE_F32), "DTYPE_F32 (1)");
  EXPECT_EQ(EnumText(static_cast<v1::DType>(77)), "77");
}

}  // namespace
}  // namespace structkv::rpc
