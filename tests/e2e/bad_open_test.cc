// Every field of `open` that can be wrong: refused before anything is reserved, with the field
// named.
#include <cmath>
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

struct OpenCase {
  std::string name;
  std::function<void(v1::Open*)> break_it;
  std::string field;
};

void PrintTo(const OpenCase& open_case, std::ostream* out) { *out << open_case.name; }

class BadOpenTest : public ServiceTest, public ::testing::WithParamInterface<OpenCase> {};

TEST_P(BadOpenTest, IsRefused) {
  Start();
  v1::Open open = SmallOpen();
  GetParam().break_it(&open);
  const Outcome outcome = Run({OpenMessage(open)});
  ExpectFailure(outcome, grpc::StatusCode::INVALID_ARGUMENT, {GetParam().field});
  EXPECT_THAT(outcome.responses, ::testing::IsEmpty()) << "nothing may be opened";
}

template <typename Value>
OpenCase Geometry(const std::string& name, void (v1::ModelGeometry::*set)(Value), Value value,
                  const std::string& field) {
  return {name, [=](v1::Open* open) { (open->mutable_geometry()->*set)(value); }, field};
}

std::vector<OpenCase> ShapeCases() {
  using G = v1::ModelGeometry;
  return {
      {"NoGeometry", [](v1::Open* open) { open->clear_geometry(); }, "geometry"},
      Geometry("NoLayers", &G::set_layer_count, 0U, "layer_count"),
      Geometry("TooManyLayers", &G::set_layer_count, 513U, "layer_count"),
      Geometry("MostLayers", &G::set_layer_count, 0xffffffffU, "layer_count"),
      Geometry("NoQueryHeads", &G::set_query_head_count, 0U, "query_head_count"),
      Geometry("UnevenQueryHeads", &G::set_query_head_count, 3U, "query_head_count"),
      Geometry("TooManyQueryHeads", &G::set_query_head_count, 1026U, "query_head_count"),
      Geometry("MostQueryHeads", &G::set_query_head_count, 0xfffffffeU, "query_head_count"),
      Geometry("NoKvHeads", &G::set_kv_head_count, 0U, "kv_head_count"),
      Geometry("MoreKvThanQueryHeads", &G::set_kv_head_count, 8U, "head_count"),
      Geometry("MostKvHeads", &G::set_kv_head_count, 0xffffffffU, "head_count"),
      Geometry("NoKeyDim", &G::set_key_dim, 0U, "key_dim"),
      Geometry("SmallKeyDim", &G::set_key_dim, 8U, "key_dim"),
      Geometry("OddKeyDim", &G::set_key_dim, 33U, "key_dim"),
      Geometry("LargeKeyDim", &G::set_key_dim, 4096U, "key_dim"),
      Geometry("MostKeyDim", &G::set_key_dim, 0xffffffffU, "key_dim"),
      Geometry("OddValueDim", &G::set_value_dim, 33U, "value_dim"),
      Geometry("MostValueDim", &G::set_value_dim, 0xffffffffU, "value_dim"),
      {"ValuesBeyondTheKeys",
       [](v1::Open* open) {
         open->mutable_geometry()->set_values_in_keys(true);
         open->mutable_geometry()->set_value_dim(64);
       },
       "geometry.value_dim: 64 is above key_dim, 32"},
      {"NoTokens", [](v1::Open* open) { open->set_prompt_tokens(0); }, "prompt_tokens"},
      {"TooManyTokens", [](v1::Open* open) { open->set_prompt_tokens((1 << 20) + 1); },
       "prompt_tokens"},
      {"MostTokens", [](v1::Open* open) { open->set_prompt_tokens(0xffffffff); }, "prompt_tokens"},
  };
}

std::vector<OpenCase> ScaleCases() {
  std::vector<OpenCase> cases;
  for (const auto& [name, scale] :
       std::vector<std::pair<std::string, double>>{{"ScaleZero", 0},
                                                   {"ScaleNegative", -0.125},
                                                   {"ScaleNan", kNan},
                                                   {"ScaleInfinite", kInf},
                                                   {"ScaleTooSmall", 1e-60},
                                                   {"ScaleTooLarge", 1e60}}) {
    cases.push_back({name, [scale = scale](v1::Open* open) { open->set_attention_scale(scale); },
                     "open.attention_scale"});
  }
  return cases;
}

std::vector<OpenCase> FieldCases() {
  return {
      {"NoDtype", [](v1::Open* open) { open->set_dtype(v1::DTYPE_UNSPECIFIED); }, "dtype"},
      {"UnknownDtype", [](v1::Open* open) { open->set_dtype(static_cast<v1::DType>(99)); },
       "dtype"},
      {"NegativeDtype", [](v1::Open* open) { open->set_dtype(static_cast<v1::DType>(-1)); },
       "dtype"},
      {"NoLayout", [](v1::Open* open) { open->set_layout(v1::LAYOUT_UNSPECIFIED); }, "layout"},
      {"UnknownLayout", [](v1::Open* open) { open->set_layout(static_cast<v1::Layout>(99)); },
       "layout"},
      {"UnknownStatistic",
       [](v1::Open* open) { open->set_statistic(static_cast<v1::Statistic>(99)); }, "statistic"},
      {"StatisticMissing", [](v1::Open* open) { open->set_statistic(v1::STATISTIC_NONE); },
       "statistic"},
      {"StatisticNotNeededByFull",
       [](v1::Open* open) {
         open->mutable_method()->mutable_full();
         open->set_statistic(v1::STATISTIC_WINDOW_QUERIES);
       },
       "statistic"},
      {"StatisticNotNeededByStreamingLlm",
       [](v1::Open* open) {
         open->mutable_method()->mutable_streaming_llm();
         open->set_statistic(v1::STATISTIC_SALIENCY);
       },
       "statistic"},
      {"SummedSaliencyForHeads",
       [](v1::Open* open) {
         open->mutable_method()->mutable_snapkv();
         open->set_statistic(v1::STATISTIC_SALIENCY);
       },
       "statistic"},
      {"LseWithoutQueries",
       [](v1::Open* open) {
         open->set_statistic(v1::STATISTIC_SALIENCY);
         open->set_window_lse(true);
       },
       "window_lse"},
      {"LseWithoutStatistic",
       [](v1::Open* open) {
         open->mutable_method()->mutable_full();
         open->set_window_lse(true);
       },
       "window_lse"},
      {"UnknownOutput", [](v1::Open* open) { open->set_output(static_cast<v1::Output>(99)); },
       "output"},
      {"LongIdempotencyKey",
       [](v1::Open* open) { open->set_idempotency_key(std::string(129, 'k')); }, "idempotency_key"},
      {"LongModelId", [](v1::Open* open) { open->set_model_id(std::string(257, 'm')); },
       "model_id"},
      {"MoreLayersInFlightThanLayers", [](v1::Open* open) { open->set_layers_in_flight(5); },
       "layers_in_flight"},
      {"MostLayersInFlight", [](v1::Open* open) { open->set_layers_in_flight(0xffffffff); },
       "layers_in_flight"},
      {"SmallResponses",
       [](v1::Open* open) { open->set_max_response_message_bytes((64 << 10) - 1); },
       "max_response_message_bytes"},
      {"LargeResponses", [](v1::Open* open) { open->set_max_response_message_bytes(0xffffffff); },
       "max_response_message_bytes"},
  };
}

// The parameters that StructKV and SnapKV share.
template <typename Method>
std::vector<OpenCase> ScoringCases(const std::string& prefix,
                                   Method* (*mutable_method)(v1::Open*)) {
  auto with = [&](const std::string& name, std::function<void(Method*)> change,
                  const std::string& field) {
    return OpenCase{prefix + name, [=](v1::Open* open) { change(mutable_method(open)); }, field};
  };
  auto ratio = [&](const std::string& name, double value) {
    return with(
        name, [=](Method* m) { m->mutable_kv_budget()->set_ratio(value); }, "kv_budget.ratio");
  };
  auto kernel = [&](const std::string& name, uint32_t value) {
    return with(
        name,
        [=](Method* m) {
          m->set_pooling(v1::POOLING_MAX);
          m->set_pooling_kernel(value);
        },
        "pooling_kernel");
  };
  return {
      ratio("ZeroRatio", 0),
      ratio("NegativeRatio", -0.1),
      ratio("RatioAboveOne", 1.0000001),
      ratio("NanRatio", kNan),
      ratio("InfiniteRatio", kInf),
      with(
          "UnknownBudgetKind",
          [](Method* m) { m->mutable_kv_budget()->set_kind(static_cast<v1::BudgetKind>(99)); },
          "kv_budget.kind"),
      with(
          "NoWindow", [](Method* m) { m->set_window_tokens(0); }, "window_tokens"),
      with(
          "LargeWindow", [](Method* m) { m->set_window_tokens(65); }, "window_tokens"),
      with(
          "MostWindow", [](Method* m) { m->set_window_tokens(0xffffffff); }, "window_tokens"),
      with(
          "UnknownGranularity",
          [](Method* m) { m->set_granularity(static_cast<v1::Granularity>(99)); }, "granularity"),
      with(
          "UnknownPooling", [](Method* m) { m->set_pooling(static_cast<v1::Pooling>(99)); },
          "pooling"),
      kernel("NoKernel", 0),
      kernel("EvenKernel", 4),
      kernel("LargeKernel", 65),
      kernel("MostKernel", 0xffffffff),
      with(
          "KernelWithoutPooling",
          [](Method* m) {
            m->set_pooling(v1::POOLING_NONE);
            m->set_pooling_kernel(5);
          },
          "pooling_kernel"),
  };
}

v1::StructKvMethod* StructKv(v1::Open* open) { return open->mutable_method()->mutable_structkv(); }
v1::SnapKvMethod* SnapKv(v1::Open* open) { return open->mutable_method()->mutable_snapkv(); }

std::vector<OpenCase> StructKvCases() {
  std::vector<OpenCase> cases = ScoringCases<v1::StructKvMethod>("", StructKv);
  auto with = [&](const std::string& name, std::function<void(v1::StructKvMethod*)> change,
                  const std::string& field) {
    cases.push_back({name, [=](v1::Open* open) { change(StructKv(open)); }, field});
  };
  auto pivot = [&](const std::string& name, std::function<void(v1::Pivot*)> change,
                   const std::string& field) {
    with(
        name, [=](v1::StructKvMethod* m) { change(m->mutable_pivot()); }, field);
  };
  for (const auto& [name, value] : {std::pair("Negative", -0.001), std::pair("AboveOne", 1.001),
                                    std::pair("Nan", kNan), std::pair("Infinite", kInf)}) {
    const double bad = value;
    with(
        std::string(name) + "Decay", [=](v1::StructKvMethod* m) { m->set_decay(bad); }, "decay");
    pivot(
        std::string(name) + "SearchBegin", [=](v1::Pivot* p) { p->set_search_begin(bad); },
        "search_begin");
    pivot(
        std::string(name) + "SearchEnd", [=](v1::Pivot* p) { p->set_search_end(bad); },
        "search_end");
    pivot(
        std::string(name) + "SparsityRatio", [=](v1::Pivot* p) { p->set_sparsity_ratio(bad); },
        "sparsity_ratio");
    with(
        std::string(name) + "SkeletonRatio",
        [=](v1::StructKvMethod* m) { m->mutable_skeleton_budget()->set_ratio(bad); },
        "skeleton_budget.ratio");
  }
  for (const auto& [name, value] :
       {std::pair("Negative", -0.001), std::pair("Nan", kNan), std::pair("Infinite", kInf)}) {
    const double bad = value;
    pivot(
        std::string(name) + "EntropyWeight", [=](v1::Pivot* p) { p->set_entropy_weight(bad); },
        "entropy_weight");
    pivot(
        std::string(name) + "SparsityWeight", [=](v1::Pivot* p) { p->set_sparsity_weight(bad); },
        "sparsity_weight");
    pivot(
        std::string(name) + "VarianceWeight", [=](v1::Pivot* p) { p->set_variance_weight(bad); },
        "variance_weight");
  }
  pivot(
      "NoWeightAtAll",
      [](v1::Pivot* p) {
        p->set_entropy_weight(0);
        p->set_sparsity_weight(0);
        p->set_variance_weight(0);
      },
      "weight");
  pivot(
      "ZeroSparsityRatio", [](v1::Pivot* p) { p->set_sparsity_ratio(0); }, "sparsity_ratio");
  with(
      "ZeroSkeletonRatio",
      [](v1::StructKvMethod* m) { m->mutable_skeleton_budget()->set_ratio(0); },
      "skeleton_budget.ratio");
  with(
      "UnknownSkeletonKind",
      [](v1::StructKvMethod* m) {
        m->mutable_skeleton_budget()->set_kind(static_cast<v1::BudgetKind>(99));
      },
      "skeleton_budget.kind");
  pivot(
      "SearchEndsBeforeItBegins",
      [](v1::Pivot* p) {
        p->set_search_begin(0.6);
        p->set_search_end(0.5);
      },
      "search_begin");
  pivot(
      "UnknownPivotMode", [](v1::Pivot* p) { p->set_mode(static_cast<v1::PivotMode>(99)); },
      "pivot.mode");
  pivot(
      "FixedWithoutLayer", [](v1::Pivot* p) { p->set_mode(v1::PIVOT_MODE_FIXED); }, "fixed_layer");
  pivot(
      "FixedPastTheEnd",
      [](v1::Pivot* p) {
        p->set_mode(v1::PIVOT_MODE_FIXED);
        p->set_fixed_layer(4);
      },
      "fixed_layer");
  pivot(
      "LayerWithExact", [](v1::Pivot* p) { p->set_fixed_layer(1); }, "fixed_layer");
  return cases;
}

std::vector<OpenCase> StreamingLlmCases() {
  auto with = [](const std::string& name, std::function<void(v1::StreamingLlmMethod*)> change,
                 const std::string& field) {
    return OpenCase{
        name, [=](v1::Open* open) { change(open->mutable_method()->mutable_streaming_llm()); },
        field};
  };
  using Method = v1::StreamingLlmMethod;
  return {
      with(
          "ZeroRatio", [](Method* m) { m->mutable_kv_budget()->set_ratio(0); }, "kv_budget.ratio"),
      with(
          "NanRatio", [](Method* m) { m->mutable_kv_budget()->set_ratio(kNan); },
          "kv_budget.ratio"),
      with(
          "RatioAboveOne", [](Method* m) { m->mutable_kv_budget()->set_ratio(1.5); },
          "kv_budget.ratio"),
      with(
          "WindowOnTop",
          [](Method* m) { m->mutable_kv_budget()->set_kind(v1::BUDGET_KIND_WINDOW_ON_TOP); },
          "kv_budget.kind"),
      with(
          "UnknownKind",
          [](Method* m) { m->mutable_kv_budget()->set_kind(static_cast<v1::BudgetKind>(99)); },
          "kv_budget.kind"),
  };
}

std::vector<OpenCase> OtherMethodCases() {
  const auto pyramid_beta = [](double beta) {
    return [=](v1::Open* open) { open->mutable_method()->mutable_pyramidkv()->set_beta(beta); };
  };
  const auto recent = [](double share) {
    return [=](v1::Open* open) { open->mutable_method()->mutable_h2o()->set_recent_share(share); };
  };
  const auto fastkv = [](std::function<void(v1::FastKvMethod*)> change) {
    return [=](v1::Open* open) {
      open->mutable_method()->mutable_fastkv()->set_tsp_layer(1);
      change(open->mutable_method()->mutable_fastkv());
    };
  };
  return {
      {"PyramidBetaBelowOne", pyramid_beta(0.5), "beta"},
      {"PyramidBetaNan", pyramid_beta(kNan), "beta"},
      {"PyramidBetaInfinite", pyramid_beta(kInf), "beta"},
      {"FastKvWithoutLayer", [](v1::Open* open) { open->mutable_method()->mutable_fastkv(); },
       "tsp_layer"},
      {"FastKvPastTheEnd", fastkv([](v1::FastKvMethod* m) { m->set_tsp_layer(4); }), "tsp_layer"},
      {"FastKvZeroSkeleton",
       fastkv([](v1::FastKvMethod* m) { m->mutable_skeleton_budget()->set_ratio(0); }),
       "skeleton_budget.ratio"},
      {"FastKvUnknownReduce",
       fastkv([](v1::FastKvMethod* m) { m->set_group_reduce(static_cast<v1::GroupReduce>(9)); }),
       "group_reduce"},
      {"FastKvOnSummedSaliency",
       [](v1::Open* open) {
         open->mutable_method()->mutable_fastkv()->set_tsp_layer(1);
         open->mutable_method()->mutable_fastkv()->set_granularity(v1::GRANULARITY_PER_LAYER);
         open->set_statistic(v1::STATISTIC_SALIENCY);
       },
       "statistic"},
      {"GemFilterWithoutLayer",
       [](v1::Open* open) {
         open->mutable_method()->mutable_gemfilter();
         open->set_output(v1::OUTPUT_PLAN);
       },
       "filter_layer"},
      {"GemFilterPastTheEnd",
       [](v1::Open* open) {
         open->mutable_method()->mutable_gemfilter()->set_filter_layer(4);
         open->set_output(v1::OUTPUT_PLAN);
       },
       "filter_layer"},
      {"GemFilterCompacts",
       [](v1::Open* open) { open->mutable_method()->mutable_gemfilter()->set_filter_layer(1); },
       "open.output"},
      {"H2oOnWindowQueries",
       [](v1::Open* open) {
         open->mutable_method()->mutable_h2o();
         open->set_statistic(v1::STATISTIC_WINDOW_QUERIES);
       },
       "attention of all queries"},
      {"H2oPerHeadOnSummedSaliency",
       [](v1::Open* open) {
         open->mutable_method()->mutable_h2o()->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
         open->set_statistic(v1::STATISTIC_SALIENCY);
       },
       "statistic"},
      {"H2oWindowOnTop",
       [](v1::Open* open) {
         open->mutable_method()->mutable_h2o()->mutable_kv_budget()->set_kind(
             v1::BUDGET_KIND_WINDOW_ON_TOP);
       },
       "kv_budget.kind"},
      {"H2oNegativeRecent", recent(-0.1), "recent_share"},
      {"H2oRecentAboveOne", recent(1.1), "recent_share"},
      {"H2oRecentNan", recent(kNan), "recent_share"},
      {"WindowReduceUnknown",
       fastkv([](v1::FastKvMethod* m) { m->set_window_reduce(static_cast<v1::WindowReduce>(9)); }),
       "window_reduce"},
      {"WindowSumOfGivenSaliency",
       [](v1::Open* open) {
         StructKv(open)->set_window_reduce(v1::WINDOW_REDUCE_SUM);
         open->set_statistic(v1::STATISTIC_SALIENCY);
       },
       "window_reduce"},
      {"GroupMaxOfGivenSaliency",
       [](v1::Open* open) {
         StructKv(open)->set_group_reduce(v1::GROUP_REDUCE_MAX);
         open->set_statistic(v1::STATISTIC_SALIENCY);
       },
       "group_reduce"},
  };
}

v1::PyramidKvMethod* PyramidKv(v1::Open* open) {
  return open->mutable_method()->mutable_pyramidkv();
}

std::string CaseName(const ::testing::TestParamInfo<OpenCase>& instance) {
  return instance.param.name;
}

INSTANTIATE_TEST_SUITE_P(Shape, BadOpenTest, ::testing::ValuesIn(ShapeCases()), CaseName);
INSTANTIATE_TEST_SUITE_P(Scale, BadOpenTest, ::testing::ValuesIn(ScaleCases()), CaseName);
INSTANTIATE_TEST_SUITE_P(Field, BadOpenTest, ::testing::ValuesIn(FieldCases()), CaseName);
INSTANTIATE_TEST_SUITE_P(StructKv, BadOpenTest, ::testing::ValuesIn(StructKvCases()), CaseName);
INSTANTIATE_TEST_SUITE_P(SnapKv, BadOpenTest,
                         ::testing::ValuesIn(ScoringCases<v1::SnapKvMethod>("", SnapKv)), CaseName);
INSTANTIATE_TEST_SUITE_P(PyramidKv, BadOpenTest,
                         ::testing::ValuesIn(ScoringCases<v1::PyramidKvMethod>("", PyramidKv)),
                         CaseName);
INSTANTIATE_TEST_SUITE_P(OtherMethods, BadOpenTest, ::testing::ValuesIn(OtherMethodCases()),
                         CaseName);
INSTANTIATE_TEST_SUITE_P(StreamingLlm, BadOpenTest, ::testing::ValuesIn(StreamingLlmCases()),
                         CaseName);

}  // namespace
}  // namespace structkv::testkit
