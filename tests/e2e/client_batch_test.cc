// The client library's batches over a real server: each prompt collects what it collects alone, to
// the byte, and fails, is cancelled or dropped for itself, with its memory given back.
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "tests/e2e/client_prompt.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using ::testing::HasSubstr;

using Sessions = std::vector<absl::StatusOr<std::unique_ptr<client::CompressSession>>>;

// Prompts of different lengths, depths, methods, types, layouts and modes.
std::vector<PromptData> Ragged() {
  std::vector<PromptData> prompts;
  v1::Open open = SmallOpen(300);
  open.set_return_saliency(true);
  prompts.emplace_back(open, 1);
  prompts.emplace_back(SmallOpen(7), 2);
  open = SmallOpen(150);
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  open.set_dtype(v1::DTYPE_F32);
  open.mutable_method()->mutable_snapkv();
  prompts.emplace_back(open, 3);
  open = SmallOpen(411);
  open.mutable_geometry()->set_layer_count(7);
  open.set_layers_in_flight(7);
  prompts.emplace_back(open, 4);
  open = SmallOpen(90);
  open.set_output(v1::OUTPUT_PLAN);
  open.mutable_method()->mutable_streaming_llm();
  prompts.emplace_back(open, 5);
  return prompts;
}

class ClientBatchTest : public ServiceTest {
 protected:
  void Start(const ServerOptions& options = TestOptions()) {
    ServiceTest::Start(options);
    client_ = *client::Client::Connect(target());
  }

  // What a prompt collects on a stream of its own.
  std::string Alone(const PromptData& data) {
    const auto compressed = client::CompressPrompt(
        *client_, data.open(), [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
          return TensorsOf(data, layer);
        });
    EXPECT_TRUE(compressed.ok()) << compressed.status();
    return compressed.ok() ? Text(*compressed) : "";
  }

  static std::vector<client::BatchPrompt> BatchOf(const std::vector<PromptData>& prompts,
                                                  v1::Pull pull = v1::PULL_UNSPECIFIED) {
    std::vector<client::BatchPrompt> batch;
    for (const PromptData& data : prompts) {
      batch.push_back({data.open(), {}});
      if (data.open().has_method() && data.open().method().has_streaming_llm()) continue;
      batch.back().open.set_pull(pull);
    }
    return batch;
  }

  // Sends a layer of each prompt in turn, and the commits; those of `but` are left out.
  void SendInTurn(const std::vector<PromptData>& prompts, Sessions& sessions,
                  size_t but = SIZE_MAX) {
    for (uint32_t layer = 0; layer < 7; ++layer) {
      for (size_t i = 0; i < prompts.size(); ++i) {
        if (i == but || layer >= prompts[i].layers()) continue;
        client::LayerTensors tensors = TensorsOf(prompts[i], layer);
        tensors.owner = alive_;
        ASSERT_TRUE((*sessions[i])->SendLayer(layer, tensors).ok()) << i;
        if (layer + 1 < prompts[i].layers()) continue;
        ASSERT_TRUE((*sessions[i])->Commit().ok()) << i;
      }
    }
  }

  // Checks that the prompts but for `but` collect what they do alone.
  void ExpectTheOthers(const std::vector<PromptData>& prompts, Sessions& sessions,
                       size_t but = SIZE_MAX) {
    for (size_t i = 0; i < prompts.size(); ++i) {
      if (i == but) continue;
      SCOPED_TRACE("prompt " + std::to_string(i));
      const auto compressed = (*sessions[i])->Collect();
      ASSERT_TRUE(compressed.ok()) << compressed.status();
      EXPECT_TRUE(Text(*compressed) == Alone(prompts[i]));
    }
  }

  int64_t reserved() { return server().sessions().budget().reserved_bytes(); }

  const std::shared_ptr<const void> alive_ = std::make_shared<int>();
  std::unique_ptr<client::Client> client_;
};

TEST_F(ClientBatchTest, EachCollectsWhatItDoesAlone) {
  Start();
  const std::vector<PromptData> prompts = Ragged();
  for (const v1::Pull pull : {v1::PULL_NONE, v1::PULL_VALUES}) {
    Sessions sessions = client_->OpenBatch(BatchOf(prompts, pull));
    for (const auto& session : sessions) ASSERT_TRUE(session.ok()) << session.status();
    SendInTurn(prompts, sessions);
    ExpectTheOthers(prompts, sessions);
  }
}

TEST_F(ClientBatchTest, EachOnAThreadOfItsOwn) {
  Start();
  const std::vector<PromptData> prompts = Ragged();
  client::StreamOptions options;
  options.chunk_bytes = 3000;
  options.max_in_flight_bytes = 10000;
  options.checksums = true;
  Sessions sessions = client_->OpenBatch(BatchOf(prompts), options);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < prompts.size(); ++i) {
    ASSERT_TRUE(sessions[i].ok()) << sessions[i].status();
    threads.emplace_back([&, i] {
      for (uint32_t layer = 0; layer < prompts[i].layers(); ++layer) {
        EXPECT_TRUE((*sessions[i])->SendLayer(layer, TensorsOf(prompts[i], layer)).ok());
      }
      EXPECT_TRUE((*sessions[i])->Commit().ok());
    });
  }
  for (std::thread& thread : threads) thread.join();
  ExpectTheOthers(prompts, sessions);
}

// In one call; a prompt that finds no room beside the others has it after them.
TEST_F(ClientBatchTest, StreamsABatchThatDoesNotFitAtOnce) {
  ServerOptions options = TestOptions();
  StartAlone(options);
  const std::vector<PromptData> prompts(3, Ragged()[3]);
  client_ = *client::Client::Connect(target());
  const std::string alone = Alone(prompts[0]);
  int64_t one = 0;
  {
    auto session = client_->OpenPrompt(prompts[0].open());
    ASSERT_TRUE(session.ok());
    one = static_cast<int64_t>((*session)->opened().reserved_bytes());
  }
  options.sessions.memory_budget_bytes = one * 5 / 2;  // two of them
  options.streams.retry_pushback = absl::Milliseconds(1);
  client_.reset();
  Restart(options);
  client_ = *client::Client::Connect(target());

  std::vector<client::BatchPrompt> batch = BatchOf(prompts);
  std::vector<std::map<uint32_t, std::string>> layers(batch.size());
  std::vector<std::string> skeletons(batch.size());
  for (size_t i = 0; i < batch.size(); ++i) {
    batch[i].options.on_event = [&, i](const client::Event& event) {
      if (const auto* layer = std::get_if<client::LayerResult>(&event)) {
        layers[i][layer->layer] = Text(*layer);
      } else if (const auto* pivot = std::get_if<client::PivotResult>(&event)) {
        for (const int32_t token : pivot->skeleton) skeletons[i] += std::to_string(token) + ",";
      }
    };
  }
  const auto source = [&](size_t prompt, uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
    return TensorsOf(prompts[prompt], layer);
  };
  const auto summaries = client::StreamBatch(*client_, batch, source);
  for (size_t i = 0; i < batch.size(); ++i) {
    EXPECT_TRUE(summaries[i].ok()) << summaries[i].status();
    std::string text;
    for (const auto& [layer, own] : layers[i]) text += own;
    EXPECT_TRUE(text + skeletons[i] == alone) << i;
  }
}

TEST_F(ClientBatchTest, ARefusedPromptLeavesTheOthers) {
  Start();
  const std::vector<PromptData> prompts = Ragged();
  std::vector<client::BatchPrompt> batch = BatchOf(prompts);
  batch[2].open.set_prompt_tokens(0);
  Sessions sessions = client_->OpenBatch(batch);
  EXPECT_EQ(sessions[2].status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(sessions[2].status().message()), HasSubstr("open.prompt_tokens"));
  SendInTurn(prompts, sessions, 2);
  ExpectTheOthers(prompts, sessions, 2);
}

// The stream's last message is a refusal, for which the client waits before it half-closes.
TEST_F(ClientBatchTest, ABatchOfWhichNoneIsAdmitted) {
  Start();
  std::vector<client::BatchPrompt> batch = BatchOf({Ragged()[0], Ragged()[1]});
  for (client::BatchPrompt& prompt : batch) prompt.open.set_prompt_tokens(0);
  client::StreamOptions options;
  options.timeout = absl::Seconds(20);  // far below the server's limit of silence
  const Sessions sessions = client_->OpenBatch(batch, options);
  for (const auto& session : sessions) {
    EXPECT_EQ(session.status().code(), absl::StatusCode::kInvalidArgument) << session.status();
    EXPECT_THAT(std::string(session.status().message()), HasSubstr("open.prompt_tokens"));
  }
}

TEST_F(ClientBatchTest, AFailingPromptLeavesTheOthers) {
  Start();
  const std::vector<PromptData> prompts = Ragged();
  Sessions sessions = client_->OpenBatch(BatchOf(prompts));
  for (const auto& session : sessions) ASSERT_TRUE(session.ok()) << session.status();
  const std::string nan =
      "\xff\xff\xff\xff" + prompts[0].tensor(1, v1::TENSOR_WINDOW_QUERIES).substr(4);
  client::LayerTensors bad = TensorsOf(prompts[0], 1);
  bad.window_queries = AsBytes(nan);
  ASSERT_TRUE((*sessions[0])->SendLayer(0, TensorsOf(prompts[0], 0)).ok());
  ASSERT_TRUE((*sessions[0])->SendLayer(1, bad).ok());
  const absl::Status status = (*sessions[0])->Wait().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("layer 1"));
  EXPECT_EQ((*sessions[0])->Commit(), status);
  SendInTurn(prompts, sessions, 0);
  ExpectTheOthers(prompts, sessions, 0);
}

// Its memory is back while the others still run.
TEST_F(ClientBatchTest, ACancelledOrDroppedPromptGivesItsMemoryBack) {
  Start();
  const std::vector<PromptData> prompts = Ragged();
  for (const bool cancel : {true, false}) {
    Sessions sessions = client_->OpenBatch(BatchOf(prompts));
    for (const auto& session : sessions) ASSERT_TRUE(session.ok()) << session.status();
    const int64_t all = reserved();
    const auto own = static_cast<int64_t>((*sessions[3])->opened().reserved_bytes());
    ASSERT_TRUE((*sessions[3])->SendLayer(0, TensorsOf(prompts[3], 0)).ok());
    if (cancel) {
      (*sessions[3])->Cancel();
      EXPECT_EQ((*sessions[3])->Collect().status().code(), absl::StatusCode::kCancelled);
    } else {
      sessions[3]->reset();
    }
    EXPECT_TRUE(Eventually([&] { return reserved() == all - own; })) << reserved();
    SendInTurn(prompts, sessions, 3);
    ExpectTheOthers(prompts, sessions, 3);
    sessions.clear();
    ExpectMemoryBack();
  }
}

TEST_F(ClientBatchTest, LeavingInTheMiddleGivesAllMemoryBack) {
  Start();
  const std::vector<PromptData> prompts = Ragged();
  for (int round = 0; round < 20; ++round) {
    Sessions sessions = client_->OpenBatch(BatchOf(prompts));
    std::vector<std::thread> threads;
    for (size_t i = 0; i < prompts.size(); ++i) {
      ASSERT_TRUE(sessions[i].ok()) << sessions[i].status();
      threads.emplace_back([&, i] {
        for (uint32_t layer = 0; layer < prompts[i].layers() / 2; ++layer) {
          EXPECT_TRUE((*sessions[i])->SendLayer(layer, TensorsOf(prompts[i], layer)).ok());
        }
        sessions[i]->reset();
      });
    }
    for (std::thread& thread : threads) thread.join();
    ExpectMemoryBack();
  }
}

}  // namespace
}  // namespace structkv::testkit
