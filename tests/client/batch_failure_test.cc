// Prompts of a batch that fail on their way: the others do not notice, and the server is told.
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "tests/client/batch_prompts.h"
#include "tests/client/fake_server.h"

namespace structkv::client {
namespace {

using ::testing::HasSubstr;

TEST(FailureTest, IsThatPromptsAlone) {
  std::map<uint32_t, Received> received;
  FakeServer server([&](int, grpc::ServerContext*, Stream* stream) {
    for (uint32_t i = 0; i < 3; ++i) {
      received[i].open = NextOpen(stream);
      SendOpened(stream, OpenedFor(received[i].open), i);
    }
    v1::CompressRequest request;
    EXPECT_TRUE(stream->Read(&request));
    EXPECT_EQ(request.prompt(), 1U);
    stream->Write(LayerResponse(received[1].open, 0, 1));
    SendFailed(stream, 1, grpc::StatusCode::OUT_OF_RANGE, "layer 9 of 3");
    return BehaveInBatch(stream, &received);
  });
  const auto client = ClientOf(server);
  Sessions sessions = client->OpenBatch(Ragged());
  for (const auto& session : sessions) ASSERT_TRUE(session.ok()) << session.status();
  CompressSession& bad = **sessions[1];
  ASSERT_TRUE(SendLayer(bad, 0).ok());
  const absl::Status status = absl::OutOfRangeError("layer 9 of 3");
  EXPECT_EQ(bad.Wait().status(), status);
  EXPECT_EQ(SendLayer(bad, 1), status);
  EXPECT_EQ(bad.Commit(), status);
  EXPECT_TRUE(bad.NextEvent().ok()) << "what came before it may be read";
  EXPECT_EQ(bad.NextEvent().status(), status);
  for (const size_t i : {0, 2}) {
    ASSERT_TRUE(SendAll(**sessions[i]).ok());
  }
  for (const size_t i : {0, 2}) ExpectAnswered(**sessions[i]);
  EXPECT_FALSE(received[1].committed);
}

// Everything was said but of the one that fails last: the half-close goes out without a commit.
TEST(FailureTest, OfTheLastOneEndsTheStream) {
  absl::Notification half_closed;
  FakeServer server([&](int, grpc::ServerContext* context, Stream* stream) {
    std::map<uint32_t, Received> received;
    for (uint32_t i = 0; i < 2; ++i) {
      received[i].open = NextOpen(stream);
      SendOpened(stream, OpenedFor(received[i].open), i);
    }
    ReadToCommit(stream, &received[0]);
    SendFailed(stream, 1, grpc::StatusCode::DATA_LOSS, "lost");
    v1::CompressRequest request;
    EXPECT_FALSE(stream->Read(&request));
    EXPECT_FALSE(context->IsCancelled());
    half_closed.Notify();
    Answer(stream, received[0], 0);
    return grpc::Status::OK;
  });
  const auto client = ClientOf(server);
  Sessions sessions = client->OpenBatch({PromptOf(6, 2), PromptOf(5, 1)});
  ASSERT_TRUE(sessions[0].ok() && sessions[1].ok());
  ASSERT_TRUE(SendAll(**sessions[0]).ok());
  EXPECT_EQ((*sessions[1])->Wait().status(), absl::DataLossError("lost"));
  EXPECT_TRUE(half_closed.WaitForNotificationWithTimeout(absl::Seconds(20)));
  ExpectAnswered(**sessions[0]);
}

// What is wrong with one prompt's answers is not the others' fault.
TEST(FailureTest, ALieAboutAPromptFailsItAlone) {
  std::map<uint32_t, Received> received;
  FakeServer server([&](int, grpc::ServerContext*, Stream* stream) {
    for (uint32_t i = 0; i < 3; ++i) {
      received[i].open = NextOpen(stream);
      SendOpened(stream, OpenedFor(received[i].open), i);
    }
    stream->Write(LayerResponse(received[1].open, 0, 1));
    stream->Write(LayerResponse(received[1].open, 0, 1));
    return BehaveInBatch(stream, &received);
  });
  const auto client = ClientOf(server);
  Sessions sessions = client->OpenBatch(Ragged());
  for (const auto& session : sessions) ASSERT_TRUE(session.ok()) << session.status();
  const absl::Status status = (*sessions[1])->Wait().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("answered twice"));
  for (const size_t i : {0, 2}) {
    ASSERT_TRUE(SendAll(**sessions[i]).ok());
    ExpectAnswered(**sessions[i]);
  }
  EXPECT_TRUE(received[1].committed);
  EXPECT_EQ(received[1].commit.layer_count(), 0U) << "the server was told";
}

// Faults that are of no prompt end all.
TEST(FailureTest, OfTheStreamIsThatOfAllThatStillRun) {
  const std::function<grpc::Status(Stream*, const Received&)> faults[] = {
      [](Stream*, const Received&) {
        return grpc::Status(grpc::StatusCode::DATA_LOSS, "the stall limit");
      },
      [](Stream* stream, const Received& received) {
        stream->Write(LayerResponse(received.open, 0, 3));
        return grpc::Status::OK;
      },
      [](Stream* stream, const Received& received) {
        stream->Write(LayerResponse(received.open, 0, 0));
        return grpc::Status::OK;
      },
  };
  const char* const texts[] = {"the stall limit", "a message is of prompt 3 of 2",
                               "a message came after the summary or failure of prompt 0"};
  for (size_t i = 0; i < 3; ++i) {
    SCOPED_TRACE(texts[i]);
    FakeServer server([&](int, grpc::ServerContext*, Stream* stream) {
      std::map<uint32_t, Received> received;
      for (uint32_t prompt = 0; prompt < 2; ++prompt) {
        received[prompt].open = NextOpen(stream);
        SendOpened(stream, OpenedFor(received[prompt].open), prompt);
      }
      ReadToCommit(stream, &received[0]);
      Answer(stream, received[0], 0);
      return faults[i](stream, received[0]);
    });
    const auto client = ClientOf(server);
    Sessions sessions = client->OpenBatch({PromptOf(6, 2), PromptOf(5, 1)});
    ASSERT_TRUE(sessions[0].ok() && sessions[1].ok());
    ASSERT_TRUE(SendAll(**sessions[0]).ok());
    const absl::Status status = (*sessions[1])->Wait().status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(status.message()), HasSubstr(texts[i]));
    EXPECT_EQ((*sessions[1])->Commit(), status);
    ExpectAnswered(**sessions[0]);
  }
}

// Asks for a prompt's rows 0, 2 and 4 of layer 0.
void SendPull(Stream* stream, uint32_t prompt) {
  v1::CompressResponse response;
  response.set_prompt(prompt);
  v1::RowPull* pull = response.mutable_pull();
  pull->set_kept_tokens(3);
  pull->add_tensors(v1::TENSOR_VALUES);
  pull->set_complete(true);
  const int32_t positions[] = {0, 2, 4};
  v1::TensorPiece* piece = pull->add_pieces();
  piece->set_tensor(v1::TENSOR_POSITIONS);
  piece->set_data(positions, sizeof positions);
  stream->Write(response);
}

// Rows are asked for and sent under their prompt's number.
TEST(PullTest, EachAnswersItsOwn) {
  std::map<uint32_t, Received> received;
  FakeServer server([&](int, grpc::ServerContext*, Stream* stream) {
    for (uint32_t i = 0; i < 2; ++i) {
      received[i].open = NextOpen(stream);
      v1::Opened opened = OpenedFor(received[i].open);
      opened.clear_required_tensors();
      opened.add_required_tensors(v1::TENSOR_KEYS);
      SendOpened(stream, opened, i);
    }
    for (const uint32_t i : {1U, 0U}) SendPull(stream, i);
    v1::CompressRequest request;
    for (int i = 0; i < 6 && stream->Read(&request); ++i)
      Take(request, &received[request.prompt()]);
    for (uint32_t i = 0; i < 2; ++i) {
      stream->Write(LayerResponse(received[i].open, 0, i));
      v1::Summary summary = SummaryFor(received[i].open, OpenedFor(received[i].open),
                                       received[i].commit.input_bytes());
      summary.set_output_bytes(summary.output_bytes() + 12);  // the positions of the pull
      SendSummary(stream, summary, i);
    }
    return grpc::Status::OK;
  });
  const std::string keys(6 * 16, 'k');
  const std::string rows[] = {std::string(48, 'a'), std::string(48, 'b')};
  std::vector<BatchPrompt> prompts(2, PromptOf(6, 1));
  for (size_t i = 0; i < 2; ++i) {
    prompts[i].open.set_pull(v1::PULL_VALUES);
    prompts[i].options.rows = [&mine = rows[i]](const RowPull&) {
      return PulledRows{{}, AsBytes(mine), nullptr};
    };
  }
  const auto client = ClientOf(server);
  Sessions sessions = client->OpenBatch(prompts);
  for (auto& session : sessions) {
    ASSERT_TRUE(session.ok()) << session.status();
    ASSERT_TRUE((*session)->Send(0, v1::TENSOR_KEYS, AsBytes(keys)).ok());
    ASSERT_TRUE((*session)->Commit().ok());
  }
  for (auto& session : sessions) ExpectAnswered(**session);
  for (uint32_t i = 0; i < 2; ++i) {
    EXPECT_EQ((received[i].tensors[{0, v1::TENSOR_VALUES}]), rows[i]);
  }
}

// A row source that fails takes its own prompt with it; a commit that waits for the rows says so.
TEST(PullTest, AFailingRowSourceFailsItsPromptAlone) {
  std::map<uint32_t, Received> received;
  FakeServer server([&](int, grpc::ServerContext*, Stream* stream) {
    received[0].open = NextOpen(stream);
    v1::Opened opened = OpenedFor(received[0].open);
    opened.clear_required_tensors();
    opened.add_required_tensors(v1::TENSOR_KEYS);
    SendOpened(stream, opened, 0);
    received[1].open = NextOpen(stream);
    SendOpened(stream, OpenedFor(received[1].open), 1);
    v1::CompressRequest request;
    EXPECT_TRUE(stream->Read(&request));
    SendPull(stream, 0);
    return BehaveInBatch(stream, &received);
  });
  std::vector<BatchPrompt> prompts(2, PromptOf(6, 1));
  prompts[0].open.set_pull(v1::PULL_VALUES);
  prompts[0].options.rows = [](const RowPull&) -> absl::StatusOr<PulledRows> {
    return absl::AbortedError("the worker is gone");
  };
  const auto client = ClientOf(server);
  Sessions sessions = client->OpenBatch(prompts);
  ASSERT_TRUE(sessions[0].ok() && sessions[1].ok());
  const std::string keys(6 * 16, 'k');
  ASSERT_TRUE((*sessions[0])->Send(0, v1::TENSOR_KEYS, AsBytes(keys)).ok());
  EXPECT_EQ((*sessions[0])->Commit(), absl::AbortedError("the worker is gone"));
  ASSERT_TRUE(SendAll(**sessions[1]).ok());
  ExpectAnswered(**sessions[1]);
  EXPECT_EQ(received[0].commit.layer_count(), 0U) << "the server was told";
}

}  // namespace
}  // namespace structkv::client
