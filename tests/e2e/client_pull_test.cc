// The client library answers the server's pulls by itself: what it collects is what it collects
// without them, to the byte, and fewer bytes travel.
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "tests/e2e/client_prompt.h"
#include "tests/testing/pull.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

class ClientPullTest : public ServiceTest {
 protected:
  void SetUp() override {
    Start();
    client_ = *client::Client::Connect(target());
  }
  absl::StatusOr<client::Compressed> Compress(const PromptData& data, v1::Pull pull,
                                              std::shared_ptr<const void> owner,
                                              const client::SessionOptions& options = {}) {
    v1::Open open = data.open();
    open.set_pull(pull);
    const auto source = [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
      client::LayerTensors tensors = TensorsOf(data, layer);
      tensors.owner = owner;
      return tensors;
    };
    return client::CompressPrompt(*client_, open, source, options);
  }

  const std::shared_ptr<const void> alive_ = std::make_shared<int>();
  std::unique_ptr<client::Client> client_;
};

TEST_F(ClientPullTest, CollectsWhatWholeLayersGive) {
  for (const v1::Layout layout : {v1::LAYOUT_HEAD_TOKEN_DIM, v1::LAYOUT_TOKEN_HEAD_DIM}) {
    for (const v1::DType dtype : {v1::DTYPE_F32, v1::DTYPE_F16, v1::DTYPE_BF16}) {
      for (const bool per_head : {false, true}) {
        for (const v1::Statistic statistic :
             {v1::STATISTIC_WINDOW_QUERIES, v1::STATISTIC_SALIENCY_PER_KV_HEAD}) {
          v1::Open open = SmallOpen(500);
          open.mutable_geometry()->set_layer_count(6);
          open.mutable_geometry()->set_value_dim(64);
          open.set_layout(layout);
          open.set_dtype(dtype);
          open.set_statistic(statistic);
          open.set_return_saliency(true);
          open.mutable_method()->mutable_structkv()->set_granularity(
              per_head ? v1::GRANULARITY_PER_KV_HEAD : v1::GRANULARITY_PER_LAYER);
          SCOPED_TRACE(open.ShortDebugString());
          const PromptData data(open, 17);
          const v1::Pull pull = statistic == v1::STATISTIC_WINDOW_QUERIES
                                    ? v1::PULL_VALUES
                                    : v1::PULL_KEYS_AND_VALUES;
          const auto whole = Compress(data, v1::PULL_NONE, alive_);
          ASSERT_TRUE(whole.ok()) << whole.status();
          client::SessionOptions small;
          small.chunk_bytes = 3000;
          small.checksums = true;
          for (const auto& [owner, options] :
               {std::pair(alive_, client::SessionOptions()),
                std::pair(std::shared_ptr<const void>(), client::SessionOptions()),
                std::pair(alive_, small)}) {
            const auto pulled = Compress(data, pull, owner, options);
            ASSERT_TRUE(pulled.ok()) << pulled.status();
            EXPECT_TRUE(Text(*pulled) == Text(*whole));
            EXPECT_LT(pulled->summary.input_bytes(), whole->summary.input_bytes());
          }
        }
      }
    }
  }
}

TEST_F(ClientPullTest, OneThreadMaySendEverythingAndReadAfterwards) {
  v1::Open open = SmallOpen(400);
  open.mutable_geometry()->set_layer_count(20);
  const PromptData data(open, 19);
  const auto whole = Compress(data, v1::PULL_NONE, alive_);
  ASSERT_TRUE(whole.ok());
  for (const uint32_t in_flight : {1U, 3U, 20U}) {
    open.set_pull(v1::PULL_VALUES);
    open.set_layers_in_flight(in_flight);
    auto session = client_->OpenPrompt(open);
    ASSERT_TRUE(session.ok()) << session.status();
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      client::LayerTensors tensors = TensorsOf(data, layer);
      tensors.owner = alive_;
      ASSERT_TRUE((*session)->SendLayer(layer, tensors).ok());
    }
    ASSERT_TRUE((*session)->Commit().ok());
    const auto pulled = (*session)->Collect();
    ASSERT_TRUE(pulled.ok()) << pulled.status();
    EXPECT_TRUE(Text(*pulled) == Text(*whole));
  }
}

// Chunked prefill: keys come in chunks, layers interleaved; values stay where they are until the
// server asks.
TEST_F(ClientPullTest, OfChunkedPrefillTakesRowsFromTheCaller) {
  v1::Open open = SmallOpen(300);
  const PromptData data(open, 23);
  const auto whole = Compress(data, v1::PULL_NONE, alive_);
  ASSERT_TRUE(whole.ok());
  open.set_pull(v1::PULL_VALUES);
  open.set_layers_in_flight(data.layers());
  std::map<uint32_t, std::string> rows;
  client::SessionOptions options;
  options.rows = [&](const client::RowPull& pull) -> absl::StatusOr<client::PulledRows> {
    const auto positions = pull.position_values();
    std::string& mine = rows[pull.layer];
    mine = PulledRows(data, pull.layer, v1::TENSOR_VALUES, {positions.begin(), positions.end()},
                      /*per_head=*/false);
    return client::PulledRows{{}, AsBytes(mine), alive_};
  };
  auto session = client_->OpenPrompt(open, options);
  ASSERT_TRUE(session.ok()) << session.status();
  const std::string keys[] = {data.tensor(0, v1::TENSOR_KEYS), data.tensor(1, v1::TENSOR_KEYS),
                              data.tensor(2, v1::TENSOR_KEYS), data.tensor(3, v1::TENSOR_KEYS)};
  const size_t head = keys[0].size() / 2;
  for (const uint32_t first : {0U, 150U}) {
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      const std::string chunk = keys[layer].substr(first * 64, 150 * 64) +
                                keys[layer].substr(head + first * 64, 150 * 64);
      client::ChunkTensors tensors;
      tensors.keys = AsBytes(chunk);
      ASSERT_TRUE((*session)->SendChunk(layer, first, 150, tensors).ok());
    }
  }
  for (uint32_t layer = 0; layer < data.layers(); ++layer) {
    const std::string& queries = data.tensor(layer, v1::TENSOR_WINDOW_QUERIES);
    ASSERT_TRUE((*session)->Send(layer, v1::TENSOR_WINDOW_QUERIES, AsBytes(queries)).ok());
  }
  ASSERT_TRUE((*session)->Commit().ok());
  const auto pulled = (*session)->Collect();
  ASSERT_TRUE(pulled.ok()) << pulled.status();
  EXPECT_TRUE(Text(*pulled) == Text(*whole));
  EXPECT_EQ(rows.size(), data.layers());
}

// Layer by layer, skeleton rows past the pivot.
TEST_F(ClientPullTest, OfSkeletonRowsInSteps) {
  for (const bool per_head : {false, true}) {
    v1::Open open = SmallOpen(400);
    open.mutable_geometry()->set_layer_count(8);
    v1::StructKvMethod* method = open.mutable_method()->mutable_structkv();
    method->mutable_pivot()->set_mode(v1::PIVOT_MODE_FIXED);
    method->mutable_pivot()->set_fixed_layer(3);
    if (per_head) method->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
    std::map<v1::Pull, std::string> texts;
    std::map<v1::Pull, uint64_t> bytes;
    for (const v1::Pull pull : {v1::PULL_NONE, v1::PULL_VALUES}) {
      PromptData data(open, 29);
      v1::Open asked = open;
      asked.set_pull(pull);
      client::SessionOptions options;
      options.on_event = [&](client::Event event) {
        if (const auto* layer = std::get_if<client::LayerResult>(&event)) {
          texts[pull] += Text(*layer);
        }
      };
      const auto source =
          [&](uint32_t layer,
              const client::PivotResult* pivot) -> absl::StatusOr<client::LayerTensors> {
        if (pivot != nullptr && layer >= *pivot->skeleton_from_layer) {
          data.KeepRows(layer, pivot->skeleton);
        }
        client::LayerTensors tensors = TensorsOf(data, layer);
        tensors.owner = alive_;
        return tensors;
      };
      const auto summary = client::StreamPromptInSteps(*client_, asked, source, options);
      ASSERT_TRUE(summary.ok()) << summary.status();
      bytes[pull] = summary->input_bytes();
    }
    EXPECT_FALSE(texts[v1::PULL_NONE].empty());
    EXPECT_TRUE(texts[v1::PULL_VALUES] == texts[v1::PULL_NONE]);
    EXPECT_LT(bytes[v1::PULL_VALUES], bytes[v1::PULL_NONE]);
  }
}

TEST_F(ClientPullTest, ASessionThatIsDroppedInTheMiddleGivesItsMemoryBack) {
  const PromptData data(SmallOpen(400), 31);
  v1::Open open = data.open();
  open.set_pull(v1::PULL_VALUES);
  client::SessionOptions options;
  options.rows = [](const client::RowPull&) -> absl::StatusOr<client::PulledRows> {
    return absl::AbortedError("the worker is gone");
  };
  auto session = client_->OpenPrompt(open, options);
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE((*session)->SendLayer(0, TensorsOf(data, 0)).ok());
  EXPECT_EQ((*session)->Commit().code(), absl::StatusCode::kAborted);
  session->reset();
  ExpectMemoryBack();
}

}  // namespace
}  // namespace structkv::testkit
