// What tests of the client library with memory of a GPU share, whatever server they start.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/e2e/client_gpu.h"

namespace structkv::testkit {

// `Base`: a ServiceTest.
template <typename Base>
class ClientGpuTest : public Base {
 protected:
  // To the server that was started, which is this process.
  static std::unique_ptr<client::Client> NewClient(const std::string& target) {
    client::ClientOptions options;
    options.own_process = true;
    return *client::Client::Connect(target, options);
  }
  void Connect() {
    client_ = NewClient(this->target());
    held_ = structkv::testing::FakeCuda::held();
  }

  std::string Inline(const PromptData& data) {
    const auto compressed = CompressInline(*client_, data);
    EXPECT_TRUE(compressed.ok()) << compressed.status();
    return compressed.ok() ? Text(*compressed) : "";
  }

  // Of a session whose tensors all lie in `arena`, which finds what messages find; the transport's
  // name.
  std::string ExpectSame(const PromptData& data, const std::shared_ptr<client::Arena>& arena,
                         const client::SessionOptions& options) {
    const std::string expected = Inline(data);
    const auto got = CompressFromGpu(*client_, data, arena, options);
    EXPECT_TRUE(got.ok()) << got.status();
    if (!got.ok()) return "";
    EXPECT_TRUE(TextOf(*got, *arena->region()) == expected);
    for (const client::LayerResult& layer : got->layers) {
      if (layer.keys.empty()) continue;
      EXPECT_EQ(arena->region()->OffsetOf(layer.keys.span()).has_value(),
                options.results != nullptr);
    }
    return got->summary.transport();
  }

  // Likewise in steps, the last of them of skeleton rows.
  void ExpectSameInSteps(const std::shared_ptr<client::Arena>& arena,
                         const client::SessionOptions& on_gpu, const std::string& transport) {
    v1::Open open = SmallOpen(400);
    open.mutable_geometry()->set_layer_count(8);
    v1::StructKvMethod* method = open.mutable_method()->mutable_structkv();
    method->mutable_pivot()->set_mode(v1::PIVOT_MODE_FIXED);
    method->mutable_pivot()->set_fixed_layer(3);
    std::string texts[2];
    for (const bool gpu : {false, true}) {
      PromptData data(open, 53);
      client::SessionOptions options = gpu ? on_gpu : client::SessionOptions();
      options.on_event = [&](const client::Event& event) {
        const auto* layer = std::get_if<client::LayerResult>(&event);
        if (layer != nullptr) texts[gpu] += Text(ToHost(*layer, *arena->region()));
      };
      const auto source = [&](uint32_t layer, const client::PivotResult* pivot) {
        if (pivot != nullptr && layer >= *pivot->skeleton_from_layer) {
          data.KeepRows(layer, pivot->skeleton);
        }
        return gpu ? GpuLayer(arena.get(), data, layer)
                   : absl::StatusOr<client::LayerTensors>(TensorsOf(data, layer));
      };
      const auto summary = client::StreamPromptInSteps(*client_, open, source, options);
      ASSERT_TRUE(summary.ok()) << summary.status();
      EXPECT_EQ(summary->transport(), gpu ? transport : "inline");
    }
    EXPECT_FALSE(texts[0].empty());
    EXPECT_TRUE(texts[1] == texts[0]);
  }

  // Likewise of several prompts in one stream.
  void ExpectSameInABatch(const std::shared_ptr<client::Arena>& arena,
                          client::SessionOptions options, const std::string& transport) {
    std::vector<PromptData> prompts;
    for (const uint32_t tokens : {300, 70, 411}) prompts.emplace_back(SmallOpen(tokens), tokens);
    std::vector<std::map<uint32_t, std::string>> texts(prompts.size());  // by layer
    std::vector<client::BatchPrompt> batch;
    for (size_t i = 0; i < prompts.size(); ++i) {
      options.on_event = [&, i](const client::Event& event) {
        const auto* layer = std::get_if<client::LayerResult>(&event);
        if (layer != nullptr) texts[i][layer->layer] = Text(ToHost(*layer, *arena->region()));
      };
      batch.push_back({prompts[i].open(), options});
    }
    const auto summaries = client::StreamBatch(
        *client_, batch,
        [&](size_t i, uint32_t layer) { return GpuLayer(arena.get(), prompts[i], layer); },
        options);
    for (size_t i = 0; i < prompts.size(); ++i) {
      ASSERT_TRUE(summaries[i].ok()) << summaries[i].status();
      EXPECT_EQ(summaries[i]->transport(), transport);
      const auto whole = CompressInline(*client_, prompts[i]);
      ASSERT_TRUE(whole.ok()) << whole.status();
      for (const auto& layer : whole->layers) EXPECT_TRUE(texts[i][layer.layer] == Text(layer));
    }
  }

  std::unique_ptr<client::Client> client_;
  structkv::testing::FakeHeld held_;  // at the beginning
};

}  // namespace structkv::testkit
