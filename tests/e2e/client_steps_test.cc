// A prompt in steps where one layer alone is looked at: the others are answered before anything was
// sent, and are not asked for.
#include <cstdint>
#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "tests/e2e/client_prompt.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using ::testing::ElementsAre;

using ClientStepsTest = ServiceTest;

TEST_F(ClientStepsTest, AskForTheLayersThatKeepTokens) {
  Start();
  const auto client = *client::Client::Connect(target());
  v1::Open open = SmallOpen(300);
  open.mutable_geometry()->set_layer_count(4);
  open.mutable_method()->mutable_gemfilter()->set_filter_layer(2);
  open.set_output(v1::OUTPUT_PLAN);
  const PromptData data(open, 5);
  std::vector<uint32_t> asked;
  uint32_t layers = 0;
  std::optional<client::PivotResult> pivot;
  client::SessionOptions options;
  options.on_event = [&](client::Event event) {
    if (auto* decided = std::get_if<client::PivotResult>(&event)) pivot = *decided;
    if (std::holds_alternative<client::LayerResult>(event)) ++layers;
  };
  const auto source = [&](uint32_t layer, const client::PivotResult*) {
    asked.push_back(layer);
    return absl::StatusOr<client::LayerTensors>(TensorsOf(data, layer));
  };
  const auto summary = client::StreamPromptInSteps(*client, open, source, options);
  ASSERT_TRUE(summary.ok()) << summary.status();
  EXPECT_THAT(asked, ElementsAre(2));
  EXPECT_EQ(layers, 4U);
  ASSERT_TRUE(pivot.has_value());
  EXPECT_FALSE(pivot->skeleton.empty());
}

}  // namespace
}  // namespace structkv::testkit
