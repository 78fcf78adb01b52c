// Several prompts in one stream: each is answered as on a stream of its own, to the byte, and fails
// for itself.
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

v1::Open BatchOpen(uint32_t tokens, const std::string& changes = "") {
  v1::Open open = SmallOpen(tokens);
  v1::Open other;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(changes, &other));
  open.MergeFrom(other);
  return open;
}

// Prompts of different lengths, methods, types and layouts.
std::vector<PromptData> Ragged() {
  std::vector<PromptData> prompts;
  prompts.emplace_back(BatchOpen(300, "return_saliency: true return_centrality: true"), 1);
  prompts.emplace_back(BatchOpen(7), 2);
  prompts.emplace_back(
      BatchOpen(150, "layout: LAYOUT_TOKEN_HEAD_DIM dtype: DTYPE_F32 method { snapkv {} }"), 3);
  prompts.emplace_back(BatchOpen(411, "geometry { layer_count: 7 } layers_in_flight: 7"), 4);
  prompts.emplace_back(BatchOpen(90, "output: OUTPUT_PLAN method { streaming_llm {} }"), 5);
  return prompts;
}

// The messages of a prompt as those of prompt `index` of `count`.
std::vector<v1::CompressRequest> MessagesOf(const PromptData& data, uint32_t index,
                                            uint32_t count) {
  std::vector<v1::CompressRequest> messages = AllMessages(data);
  for (v1::CompressRequest& message : messages) message.set_prompt(index);
  messages[0].mutable_open()->set_batch_prompt_count(count);
  return messages;
}

// A message of each prompt in turn.
std::vector<v1::CompressRequest> Interleaved(const std::vector<PromptData>& prompts) {
  std::vector<std::vector<v1::CompressRequest>> all;
  const auto count = static_cast<uint32_t>(prompts.size());
  for (uint32_t i = 0; i < count; ++i) all.push_back(MessagesOf(prompts[i], i, count));
  std::vector<v1::CompressRequest> messages;
  for (size_t step = 0;; ++step) {
    const size_t before = messages.size();
    for (const auto& own : all) {
      if (step < own.size()) messages.push_back(own[step]);
    }
    if (messages.size() == before) return messages;
  }
}

// One prompt after the other.
std::vector<v1::CompressRequest> Consecutive(const std::vector<PromptData>& prompts) {
  std::vector<v1::CompressRequest> messages;
  const auto count = static_cast<uint32_t>(prompts.size());
  for (uint32_t i = 0; i < count; ++i) {
    for (auto& message : MessagesOf(prompts[i], i, count)) messages.push_back(std::move(message));
  }
  return messages;
}

// The answers of one prompt, as if it had had the stream to itself. Without `failed`.
Outcome OutcomeOf(const Outcome& batch, uint32_t index) {
  Outcome own;
  own.status = batch.status;
  for (const v1::CompressResponse& response : batch.responses) {
    if (response.prompt() != index || response.has_failed()) continue;
    own.responses.push_back(response);
  }
  return own;
}

// By prompt.
std::map<uint32_t, v1::PromptFailure> FailuresOf(const Outcome& batch) {
  std::map<uint32_t, v1::PromptFailure> failures;
  for (const v1::CompressResponse& response : batch.responses) {
    if (!response.has_failed()) continue;
    EXPECT_TRUE(failures.emplace(response.prompt(), response.failed()).second);
  }
  return failures;
}

class BatchTest : public ServiceTest {
 protected:
  std::string Alone(const PromptData& data) {
    const Outcome outcome = Run(AllMessages(data));
    ExpectSuccess(data, outcome);
    return ResultBytes(Assemble(outcome));
  }

  // Checks that the prompts but for `but` succeeded as they do alone.
  void ExpectTheOthers(const std::vector<PromptData>& prompts, const Outcome& outcome,
                       uint32_t but = UINT32_MAX) {
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    for (uint32_t i = 0; i < prompts.size(); ++i) {
      if (i == but) continue;
      SCOPED_TRACE("prompt " + std::to_string(i));
      const Answer answer = Assemble(OutcomeOf(outcome, i));
      EXPECT_THAT(answer.faults, IsEmpty());
      EXPECT_TRUE(ResultBytes(answer) == Alone(prompts[i]));
    }
  }
};

TEST_F(BatchTest, EachIsAnsweredAsAlone) {
  Start();
  const std::vector<PromptData> prompts = Ragged();
  const Outcome interleaved = Run(Interleaved(prompts));
  EXPECT_THAT(FailuresOf(interleaved), IsEmpty());
  ExpectTheOthers(prompts, interleaved);
  ExpectTheOthers(prompts, Run(Consecutive(prompts)));
}

// The first message may be any prompt's.
TEST_F(BatchTest, InAnyOrder) {
  Start();
  std::vector<PromptData> prompts = Ragged();
  std::vector<v1::CompressRequest> messages;
  const auto count = static_cast<uint32_t>(prompts.size());
  for (uint32_t i = count; i-- > 0;) {
    for (auto& message : MessagesOf(prompts[i], i, count)) {
      // What the first open said holds for all.
      if (i + 1 < count && message.has_open()) message.mutable_open()->clear_batch_prompt_count();
      messages.push_back(std::move(message));
    }
  }
  ExpectTheOthers(prompts, Run(messages));
}

TEST_F(BatchTest, ASummaryComesBeforeTheNextPromptIsSent) {
  Start();
  const std::vector<PromptData> prompts = Ragged();
  Call call(channel());
  for (const auto& message : MessagesOf(prompts[0], 0, 2)) call.Send(message);
  ASSERT_TRUE(call.WaitForResponses(7));  // opened, 4 layers, pivot, summary
  for (const auto& message : MessagesOf(prompts[1], 1, 2)) call.Send(message);
  call.HalfClose();
  const Outcome outcome = call.Finish();
  ASSERT_GT(outcome.responses.size(), 7U);
  EXPECT_TRUE(outcome.responses[6].has_summary());
  ExpectTheOthers({prompts[0], prompts[1]}, outcome);
}

TEST_F(BatchTest, ABadOpenFailsItsPromptAlone) {
  Start();
  const std::vector<PromptData> prompts = Ragged();
  std::vector<v1::CompressRequest> messages = Interleaved(prompts);
  messages[2].mutable_open()->set_prompt_tokens(0);
  const Outcome outcome = Run(messages);
  ExpectTheOthers(prompts, outcome, 2);
  const auto failures = FailuresOf(outcome);
  ASSERT_EQ(failures.size(), 1U);
  EXPECT_EQ(failures.at(2).code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(failures.at(2).message(), HasSubstr("open.prompt_tokens"));
  EXPECT_FALSE(failures.at(2).has_retry_after_millis());
  EXPECT_THAT(OutcomeOf(outcome, 2).responses, IsEmpty());
}

TEST_F(BatchTest, ABadPieceFailsItsPromptAlone) {
  Start();
  const std::vector<PromptData> prompts = Ragged();
  for (const bool unknown_tensor : {false, true}) {
    std::vector<v1::CompressRequest> messages = Interleaved(prompts);
    const auto bad = std::find_if(messages.begin(), messages.end(), [](const auto& message) {
      return message.prompt() == 0 && message.has_pieces();
    });
    v1::TensorPiece* piece = bad->mutable_pieces()->mutable_pieces(0);
    if (unknown_tensor) {
      piece->set_tensor(v1::TENSOR_CENTRALITY);
    } else {
      piece->set_layer(9);
    }
    const Outcome outcome = Run(messages);
    ExpectTheOthers(prompts, outcome, 0);
    const auto failures = FailuresOf(outcome);
    ASSERT_EQ(failures.size(), 1U);
    EXPECT_EQ(failures.at(0).code(),
              unknown_tensor ? grpc::StatusCode::INVALID_ARGUMENT : grpc::StatusCode::OUT_OF_RANGE);
    EXPECT_THAT(failures.at(0).message(), HasSubstr(unknown_tensor ? "CENTRALITY" : "layer 9"));
    EXPECT_TRUE(OutcomeOf(outcome, 0).responses.back().has_opened()) << "nothing follows `failed`";
  }
}

TEST_F(BatchTest, ABadStatisticFailsItsPromptAlone) {
  Start();
  std::vector<PromptData> prompts = Ragged();
  PromptData bad = prompts[2];
  bad.mutable_tensor(1, v1::TENSOR_WINDOW_QUERIES)->replace(0, 4, "\xff\xff\xff\xff", 4);  // NaN
  std::vector<PromptData> sent = prompts;
  sent[2] = bad;
  const Outcome outcome = Run(Interleaved(sent));
  ExpectTheOthers(prompts, outcome, 2);
  const auto failures = FailuresOf(outcome);
  ASSERT_EQ(failures.size(), 1U);
  EXPECT_EQ(failures.at(2).code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(failures.at(2).message(), HasSubstr("layer 1"));
}

TEST_F(BatchTest, AMissingCommitFailsItsPromptAlone) {
  Start();
  const std::vector<PromptData> prompts = Ragged();
  std::vector<v1::CompressRequest> messages = Interleaved(prompts);
  std::erase_if(messages,
                [](const auto& message) { return message.prompt() == 1 && message.has_commit(); });
  const Outcome outcome = Run(messages);
  ExpectTheOthers(prompts, outcome, 1);
  EXPECT_THAT(FailuresOf(outcome).at(1).message(), HasSubstr("ended before `commit`"));
}

// The memory of a prompt that failed is back while the others still run.
TEST_F(BatchTest, AFailedPromptGivesItsMemoryBack) {
  StartAlone(TestOptions());
  const std::vector<PromptData> prompts = Ragged();
  Call call(channel());
  call.Send(MessagesOf(prompts[0], 0, 2)[0]);
  ASSERT_TRUE(call.WaitForResponses(1));
  const int64_t one = server().sessions().budget().reserved_bytes();
  call.Send(MessagesOf(prompts[3], 1, 2)[0]);
  ASSERT_TRUE(call.WaitForResponses(2));
  EXPECT_GT(server().sessions().budget().reserved_bytes(), one);
  v1::CompressRequest bad = PieceMessage(MakePiece(prompts[3], 0, v1::TENSOR_KEYS));
  bad.set_prompt(1);
  bad.mutable_pieces()->mutable_pieces(0)->set_xxh3_64(1);
  call.Send(bad);
  ASSERT_TRUE(call.WaitForResponses(3));
  EXPECT_TRUE(Eventually([&] { return server().sessions().budget().reserved_bytes() == one; }));
  // What still comes of it is dropped.
  for (const auto& message : MessagesOf(prompts[3], 1, 2)) {
    if (message.has_pieces()) call.Send(message);
  }
  std::vector<v1::CompressRequest> rest = MessagesOf(prompts[0], 0, 2);
  rest.erase(rest.begin());
  for (const auto& message : rest) call.Send(message);
  call.HalfClose();
  const Outcome outcome = call.Finish();
  ExpectTheOthers({prompts[0]}, outcome);
  EXPECT_EQ(FailuresOf(outcome).at(1).code(), grpc::StatusCode::DATA_LOSS);
}

TEST_F(BatchTest, APromptWithoutRoomSaysWhenToTryAgain) {
  const std::vector<PromptData> prompts = Ragged();
  ServerOptions options = TestOptions();
  StartAlone(options);
  int64_t small = 0;
  {
    Call call(channel());
    call.Send(OpenMessage(prompts[1].open()));
    small = static_cast<int64_t>(call.WaitForOpened().value_or(v1::Opened()).reserved_bytes());
  }
  options.sessions.memory_budget_bytes = small * 5 / 2;  // two of them
  options.streams.retry_pushback = absl::Milliseconds(1234);
  Restart(options);
  const std::vector<PromptData> three(3, prompts[1]);
  const Outcome outcome = Run(Interleaved(three));
  const auto failures = FailuresOf(outcome);
  ASSERT_EQ(failures.size(), 1U);
  EXPECT_EQ(failures.at(2).code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(failures.at(2).retry_after_millis(), 1234U);
  EXPECT_FALSE(outcome.trailers.contains("grpc-retry-pushback-ms"));
  ExpectNothingHeld();
  ExpectTheOthers(three, outcome, 2);
}

TEST_F(BatchTest, AllMayFail) {
  Start();
  std::vector<v1::CompressRequest> messages;
  for (uint32_t i = 0; i < 3; ++i) {
    v1::CompressRequest& message = messages.emplace_back(OpenMessage(BatchOpen(0)));
    message.set_prompt(i);
    message.mutable_open()->set_batch_prompt_count(3);
  }
  const Outcome outcome = Run(messages);
  EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  EXPECT_EQ(FailuresOf(outcome).size(), 3U);
  ExpectMemoryBack();
}

// Faults of the stream end all of it.
TEST_F(BatchTest, FaultsOfTheStream) {
  Start();
  const std::vector<PromptData> prompts = Ragged();
  const auto open = [&](uint32_t index, uint32_t count) {
    return MessagesOf(prompts[index], index, count)[0];
  };
  v1::CompressRequest far = open(0, 2);
  far.set_prompt(2);
  v1::CompressRequest of_none = MessagesOf(prompts[0], 0, 2)[1];
  of_none.set_prompt(1);
  const struct {
    std::vector<v1::CompressRequest> messages;
    std::vector<std::string> texts;
  } cases[] = {
      {{open(0, 2), far}, {"prompt is 2", "carries 2", "batch_prompt_count"}},
      {{far}, {"prompt is 2", "carries 2"}},
      {{open(0, 1025)}, {"open.batch_prompt_count is 1025", "1024"}},
      {{open(0, 2), open(1, 3)}, {"open.batch_prompt_count is 3 of prompt 1", "said 2"}},
      {{open(0, 2), open(0, 2)}, {"`open` came after `open` of prompt 0"}},
      {{open(0, 2), of_none}, {"`pieces` came first of prompt 1; `open` is due"}},
      {{open(0, 2)}, {"ended before `open` of prompt 1 of 2"}},
  };
  for (const auto& each : cases) {
    SCOPED_TRACE(each.texts[0]);
    ExpectFailure(Run(each.messages), grpc::StatusCode::INVALID_ARGUMENT, each.texts);
    ExpectMemoryBack();
  }
  Call garbage(channel());
  garbage.Send(open(0, 2));
  garbage.SendBytes("\x12\xff");
  ExpectFailure(garbage.Finish(), grpc::StatusCode::INVALID_ARGUMENT, {"parse"});
  ExpectMemoryBack();
}

TEST_F(BatchTest, ACallerThatLeavesEndsAll) {
  Start();
  const std::vector<PromptData> prompts = Ragged();
  Call call(channel());
  for (uint32_t i = 0; i < 3; ++i) call.Send(MessagesOf(prompts[i], i, 5)[0]);
  ASSERT_TRUE(call.WaitForResponses(3));
  call.Cancel();
  EXPECT_EQ(call.Finish().status.error_code(), grpc::StatusCode::CANCELLED);
  ExpectMemoryBack();
}

}  // namespace
}  // namespace structkv::testkit
