// The captured prompt of a real model, against what tests/data/make_golden.py computes from the
// definitions with none of this project's code.
#include <algorithm>
#include <fstream>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "client/cli/capture.h"
#include "client/cli/compressor.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace structkv::cli {
namespace {

using Json = nlohmann::json;

const Json& Golden() {
  static const Json golden =
      Json::parse(std::ifstream(STRUCTKV_TEST_DATA "/golden-tiny-llama-1000.json"));
  return golden;
}

void SetBudget(const Json& c, v1::Budget* budget) {
  budget->set_ratio(c.at("ratio"));
  if (c.at("on_top").get<bool>()) budget->set_kind(v1::BUDGET_KIND_WINDOW_ON_TOP);
}

template <typename M>
void SetScoring(const Json& c, M* method) {
  SetBudget(c, method->mutable_kv_budget());
  method->set_window_tokens(c.at("window"));
  method->set_granularity(c.at("per_kv_head").get<bool>() ? v1::GRANULARITY_PER_KV_HEAD
                                                          : v1::GRANULARITY_PER_LAYER);
  const std::string pooling = c.at("pooling");
  method->set_pooling(pooling == "avg"   ? v1::POOLING_AVG
                      : pooling == "max" ? v1::POOLING_MAX
                                         : v1::POOLING_NONE);
  if (pooling != "none") method->set_pooling_kernel(c.at("kernel"));
}

v1::Method MakeMethod(const Json& c) {
  v1::Method method;
  if (c.at("method") == "snapkv") {
    SetScoring(c, method.mutable_snapkv());
  } else if (c.at("method") == "streaming_llm") {
    SetBudget(c, method.mutable_streaming_llm()->mutable_kv_budget());
  } else {
    v1::StructKvMethod* structkv = method.mutable_structkv();
    SetScoring(c, structkv);
    if (c.at("on_top").get<bool>()) {
      structkv->mutable_skeleton_budget()->set_kind(v1::BUDGET_KIND_WINDOW_ON_TOP);
    }
    if (!c.at("fixed_layer").is_null()) {
      structkv->mutable_pivot()->set_mode(v1::PIVOT_MODE_FIXED);
      structkv->mutable_pivot()->set_fixed_layer(c.at("fixed_layer"));
    }
  }
  return method;
}

// The sets may differ in the positions that are too close to call, and nowhere else.
void ExpectSame(const std::vector<int32_t>& got, const Json& want_json, const Json& close_json,
                const std::string& what) {
  const auto want = want_json.get<std::vector<int32_t>>();
  const auto close = close_json.get<std::set<int32_t>>();
  EXPECT_EQ(got.size(), want.size()) << what;
  EXPECT_TRUE(std::is_sorted(got.begin(), got.end())) << what;
  std::vector<int32_t> different;
  std::set_symmetric_difference(got.begin(), got.end(), want.begin(), want.end(),
                                std::back_inserter(different));
  for (int32_t position : different) {
    EXPECT_TRUE(close.count(position) > 0) << what << ": position " << position;
  }
}

void ExpectMetrics(const v1::LayerMetrics& got, const Json& want, const std::string& what) {
  const auto near = [&](double value, double wanted, const char* name) {
    EXPECT_NEAR(value, wanted, 1e-5 * (1 + std::abs(wanted))) << what << ", " << name;
  };
  near(got.entropy(), want.at("entropy"), "entropy");
  near(got.sparsity(), want.at("sparsity"), "sparsity");
  near(got.variance(), want.at("variance"), "variance");
}

class GoldenTest : public ::testing::TestWithParam<std::tuple<std::string, size_t>> {};

TEST_P(GoldenTest, KeepsWhatTheDefinitionsSay) {
  const auto& [backend, index] = GetParam();
  const Json& wanted = Golden().at("cases").at(index);
  const auto capture =
      Capture::Open(STRUCTKV_TEST_DATA "/" + Golden().at("capture").get<std::string>());
  ASSERT_TRUE(capture.ok()) << capture.status();
  v1::Open open = capture->MakeOpen();
  *open.mutable_method() = MakeMethod(wanted);
  if (open.method().has_streaming_llm()) {
    open.set_statistic(v1::STATISTIC_NONE);
    open.set_window_lse(false);
  }
  open.set_return_centrality(open.method().has_structkv());
  ConnectionFlags flags;
  flags.in_process = true;
  flags.backend = backend;
  flags.threads = 2;
  const auto compressor = MakeCompressor(flags);
  ASSERT_TRUE(compressor.ok()) << compressor.status();

  v1::Opened opened;
  client::SessionOptions options;
  options.on_opened = [&](const v1::Opened& o) { opened = o; };
  const auto compressed =
      (*compressor)
          ->Collect(
              open, [&](uint32_t layer) { return capture->Layer(layer, opened); }, options);
  ASSERT_TRUE(compressed.ok()) << compressed.status();
  EXPECT_EQ(compressed->summary.backend(), backend);

  ASSERT_EQ(compressed->layers.size(), wanted.at("layers").size());
  for (size_t l = 0; l < compressed->layers.size(); ++l) {
    const client::LayerResult& layer = compressed->layers[l];
    const Json& want = wanted.at("layers").at(l);
    const std::string name = "layer " + std::to_string(l);
    const auto positions = layer.position_values();
    const size_t rows = want.at("positions").size();
    ASSERT_EQ(positions.size(), rows * layer.kept_tokens) << name;
    for (size_t row = 0; row < rows; ++row) {
      const auto part = positions.subspan(row * layer.kept_tokens, layer.kept_tokens);
      ExpectSame({part.begin(), part.end()}, want.at("positions").at(row), want.at("close").at(row),
                 name + ", row " + std::to_string(row));
    }
    ASSERT_EQ(layer.metrics.has_value(), want.contains("entropy")) << name;
    if (layer.metrics.has_value()) ExpectMetrics(*layer.metrics, want, name);
  }

  ASSERT_EQ(compressed->pivot.has_value(), wanted.contains("pivot"));
  if (!compressed->pivot.has_value()) return;
  const client::PivotResult& pivot = *compressed->pivot;
  const Json& want = wanted.at("pivot");
  EXPECT_EQ(pivot.pivot_layer, want.at("layer").get<uint32_t>());
  EXPECT_EQ(pivot.transition_layer.has_value(), !want.at("transition_layer").is_null());
  if (pivot.transition_layer.has_value()) {
    EXPECT_EQ(*pivot.transition_layer, want.at("transition_layer").get<uint32_t>());
  }
  ASSERT_EQ(pivot.layers.size(), want.at("transition").size());
  for (size_t l = 1; l < pivot.layers.size(); ++l) {
    EXPECT_NEAR(pivot.layers[l].transition(), want.at("transition").at(l).get<double>(), 1e-5);
  }
  ExpectSame(pivot.skeleton, want.at("skeleton"), want.at("close"), "skeleton");
  double total = 0;
  for (float c : pivot.centrality) total += c;
  EXPECT_NEAR(total, want.at("centrality_total").get<double>(), 1e-4 * total);
}

INSTANTIATE_TEST_SUITE_P(Captured, GoldenTest,
                         ::testing::Combine(::testing::Values("reference", "cpu"),
                                            ::testing::Range<size_t>(0,
                                                                     Golden().at("cases").size())),
                         [](const ::testing::TestParamInfo<GoldenTest::ParamType>& instance) {
                           const Json& name =
                               Golden().at("cases").at(std::get<1>(instance.param)).at("name");
                           return std::get<0>(instance.param) + "_" + name.get<std::string>();
                         });

}  // namespace
}  // namespace structkv::cli
