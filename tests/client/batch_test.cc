// Several prompts in one stream, against a server that behaves: each is what it would be alone.
#include <atomic>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "tests/client/batch_prompts.h"
#include "tests/client/fake_server.h"

namespace structkv::client {
namespace {

using ::testing::ElementsAre;

class BatchTest : public BatchServerTest {
 protected:
  void ExpectAllReceived(size_t prompts) {
    ended_.WaitForNotification();
    EXPECT_FALSE(cancelled_) << "a batch that went well ends by its half-close";
    ASSERT_EQ(received_.size(), prompts);
    for (const auto& [index, received] : received_) {
      SCOPED_TRACE(absl::StrCat("prompt ", index));
      ExpectAllOf(received);
    }
  }
};

TEST_F(BatchTest, EachIsSentAndAnsweredForItself) {
  Sessions sessions = client_->OpenBatch(Ragged());
  ASSERT_EQ(sessions.size(), 3U);
  for (const auto& session : sessions) ASSERT_TRUE(session.ok()) << session.status();
  // A layer of each in turn, as long as it has one.
  for (uint32_t layer = 0; layer < 3; ++layer) {
    for (auto& session : sessions) {
      if (layer < (*session)->open().geometry().layer_count()) {
        ASSERT_TRUE(SendLayer(**session, layer).ok());
      }
    }
  }
  for (const size_t i : {2, 0, 1}) ASSERT_TRUE((*sessions[i])->Commit().ok());
  for (auto& session : sessions) ExpectAnswered(**session);
  ExpectAllReceived(3);
  std::set<std::string> keys;
  for (const auto& [index, received] : received_) {
    EXPECT_EQ(received.open.batch_prompt_count(), 3U);
    EXPECT_EQ(received.open.prompt_tokens(), Ragged()[index].open.prompt_tokens());
    keys.insert(received.open.idempotency_key());
  }
  EXPECT_EQ(keys.size(), 3U);
}

TEST_F(BatchTest, OneAfterTheOtherOnOneThread) {
  Sessions sessions = client_->OpenBatch(Ragged());
  for (auto& session : sessions) {
    ASSERT_TRUE(session.ok()) << session.status();
    // Its summary comes while nothing of the next one was sent.
    ASSERT_TRUE(SendAll(**session).ok());
    ASSERT_TRUE((*session)->Wait().ok());
    ExpectAnswered(**session);
    EXPECT_EQ((*session)->NextEvent().status().code(), absl::StatusCode::kOutOfRange);
  }
  ExpectAllReceived(3);
}

TEST_F(BatchTest, EachOnThreadsOfItsOwn) {
  std::vector<BatchPrompt> prompts;
  for (uint32_t i = 0; i < 12; ++i) prompts.push_back(PromptOf(100 + 37 * i, 20));
  StreamOptions options;
  options.chunk_bytes = 700;
  options.max_in_flight_bytes = 5000;  // so that they wait for each other
  Sessions sessions = client_->OpenBatch(prompts, options);
  std::vector<std::thread> threads;
  for (auto& session : sessions) {
    ASSERT_TRUE(session.ok()) << session.status();
    threads.emplace_back([&session] { EXPECT_TRUE(SendAll(**session).ok()); });
    threads.emplace_back([&session] { ExpectAnswered(**session); });
  }
  for (std::thread& thread : threads) thread.join();
  ExpectAllReceived(12);
}

TEST_F(BatchTest, OnePromptAloneIsNoBatch) {
  std::vector<BatchPrompt> prompts = {PromptOf(6, 2)};
  prompts[0].open.set_batch_prompt_count(4);
  prompts[0].open.set_idempotency_key("mine");
  Sessions sessions = client_->OpenBatch(prompts);
  ASSERT_TRUE(sessions.at(0).ok()) << sessions[0].status();
  ASSERT_TRUE(SendAll(**sessions[0]).ok());
  ExpectAnswered(**sessions[0]);
  ExpectAllReceived(1);
  EXPECT_EQ(received_[0].open.batch_prompt_count(), 0U);
  EXPECT_EQ(received_[0].open.idempotency_key(), "mine");
  EXPECT_TRUE(client_->OpenBatch({}).empty());
}

TEST_F(BatchTest, ResultsGoWhereEachPromptSays) {
  struct Own {
    v1::Opened opened;
    std::vector<size_t> kinds;
    std::vector<std::byte> memory = std::vector<std::byte>(1 << 16);
    size_t used = 0;
    bool outside = false;
  };
  std::vector<BatchPrompt> prompts = Ragged();
  std::vector<Own> own(prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    PromptOptions& options = prompts[i].options;
    options.on_opened = [&mine = own[i]](const v1::Opened& opened) { mine.opened = opened; };
    options.allocate = [&mine = own[i]](uint32_t, v1::Tensor, size_t size) {
      Bytes bytes(mine.memory.data() + mine.used, size, nullptr);
      mine.used += (size + 63) / 64 * 64;
      return bytes;
    };
    options.on_event = [&mine = own[i]](const Event& event) {
      mine.kinds.push_back(event.index());
      if (const auto* layer = std::get_if<LayerResult>(&event)) {
        const std::byte* end = mine.memory.data() + mine.used;
        mine.outside |= layer->keys.data() < mine.memory.data() || layer->keys.data() >= end;
      }
    };
  }
  Sessions sessions = client_->OpenBatch(prompts);
  for (size_t i = 0; i < sessions.size(); ++i) {
    ASSERT_TRUE(sessions[i].ok()) << sessions[i].status();
    EXPECT_EQ(own[i].opened.kept_tokens_size(),
              static_cast<int>(prompts[i].open.geometry().layer_count()));
    ASSERT_TRUE(SendAll(**sessions[i]).ok());
    EXPECT_EQ((*sessions[i])->NextEvent().status().code(), absl::StatusCode::kFailedPrecondition);
  }
  for (auto& session : sessions) ASSERT_TRUE((*session)->Wait().ok());
  for (const Own& each : own) EXPECT_FALSE(each.outside);
  EXPECT_THAT(own[0].kinds, ElementsAre(0, 0, 2));
  EXPECT_THAT(own[1].kinds, ElementsAre(0, 0, 0, 2));
  EXPECT_THAT(own[2].kinds, ElementsAre(0, 2));
}

// The results of all prompts count for one bound.
TEST_F(BatchTest, ReadsOnWhenTheReadersCome) {
  std::vector<BatchPrompt> prompts(3, PromptOf(6, 300));
  StreamOptions options;
  options.max_buffered_result_bytes = 300;
  Sessions sessions = client_->OpenBatch(prompts, options);
  std::vector<std::thread> readers;
  for (auto& session : sessions) {
    ASSERT_TRUE(session.ok()) << session.status();
    readers.emplace_back([&session] { ExpectAnswered(**session); });
  }
  for (auto& session : sessions) ASSERT_TRUE(SendAll(**session).ok());
  for (std::thread& reader : readers) reader.join();
  ExpectAllReceived(3);
}

// A layer of each prompt in turn, in one call.
TEST_F(BatchTest, StreamsABatch) {
  std::vector<BatchPrompt> prompts = Ragged();
  std::vector<int> events(prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    prompts[i].options.on_event = [&mine = events[i]](const Event&) { ++mine; };
  }
  std::string order;
  std::vector<std::string> data;
  data.reserve(18);
  const auto source = [&](size_t prompt, uint32_t layer) -> absl::StatusOr<LayerTensors> {
    absl::StrAppend(&order, prompt, ".", layer, " ");
    const auto make = [&](v1::Tensor tensor) {
      data.push_back(InputOf(prompts[prompt].open, layer, tensor));
      return AsBytes(data.back());
    };
    LayerTensors tensors;
    tensors.window_queries = make(v1::TENSOR_WINDOW_QUERIES);
    tensors.keys = make(v1::TENSOR_KEYS);
    tensors.values = make(v1::TENSOR_VALUES);
    return tensors;
  };
  const auto summaries = StreamBatch(*client_, prompts, source);
  ASSERT_EQ(summaries.size(), 3U);
  for (size_t i = 0; i < 3; ++i) {
    ASSERT_TRUE(summaries[i].ok()) << summaries[i].status();
    EXPECT_EQ(summaries[i]->logical_length(), prompts[i].open.prompt_tokens());
  }
  EXPECT_EQ(order, "0.0 1.0 2.0 0.1 1.1 1.2 ");
  EXPECT_THAT(events, ElementsAre(3, 4, 2));
  ExpectAllReceived(3);
}

TEST_F(BatchTest, AFailingSourceFailsItsPromptAlone) {
  std::vector<BatchPrompt> prompts = Ragged();
  const auto source = [&](size_t prompt, uint32_t layer) -> absl::StatusOr<LayerTensors> {
    if (prompt == 1 && layer == 1) return absl::NotFoundError("no such layer");
    static const std::byte zeros[11 * 16] = {};
    const uint32_t tokens = prompts[prompt].open.prompt_tokens();
    LayerTensors tensors;
    tensors.window_queries = absl::MakeConstSpan(zeros, 2 * 2 * 16);
    tensors.keys = tensors.values = absl::MakeConstSpan(zeros, tokens * 16);
    return tensors;
  };
  const auto summaries = StreamBatch(*client_, prompts, source);
  EXPECT_TRUE(summaries.at(0).ok()) << summaries[0].status();
  EXPECT_EQ(summaries.at(1).status(), absl::NotFoundError("no such layer"));
  EXPECT_TRUE(summaries.at(2).ok()) << summaries[2].status();
  ended_.WaitForNotification();
  EXPECT_EQ(received_[1].commit.layer_count(), 0U) << "the server was told";
}

}  // namespace
}  // namespace structkv::client
