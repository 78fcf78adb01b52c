// Several prompts in one stream, some of which fail, are refused, cancelled or dropped: the others
// do not notice, and the server is told.
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "tests/client/batch_prompts.h"
#include "tests/client/fake_server.h"

namespace structkv::client {
namespace {

using ::testing::HasSubstr;

std::unique_ptr<Client> ClientOf(const FakeServer& server) {
  return *Client::Connect(server.address());
}

StreamOptions QuickRetries(int attempts) {
  StreamOptions options;
  options.retry.max_attempts = attempts;
  options.retry.initial_backoff = absl::Milliseconds(1);
  return options;
}

// Reads the next message, which must be the `open` of a prompt.
v1::Open NextOpen(Stream* stream) {
  v1::CompressRequest request;
  EXPECT_TRUE(stream->Read(&request) && request.has_open());
  return request.open();
}

// A layer of any prompt of Ragged().
absl::StatusOr<LayerTensors> Zeros(size_t prompt, uint32_t /*layer*/) {
  static const std::byte zeros[11 * 16] = {};
  LayerTensors tensors;
  tensors.window_queries = absl::MakeConstSpan(zeros, 2 * 2 * 16);
  tensors.keys = absl::MakeConstSpan(zeros, Ragged()[prompt].open.prompt_tokens() * 16);
  tensors.values = tensors.keys;
  return tensors;
}

// ---- Refused prompts, and trying again ----

TEST(RefusedTest, LeavesTheOthersAsTheyAre) {
  std::map<uint32_t, Received> received;
  FakeServer server([&](int, grpc::ServerContext*, Stream* stream) {
    received[0].open = NextOpen(stream);
    SendOpened(stream, OpenedFor(received[0].open));
    NextOpen(stream);
    SendFailed(stream, 1, grpc::StatusCode::RESOURCE_EXHAUSTED, "no room", 1234);
    return BehaveInBatch(stream, &received);
  });
  const auto client = ClientOf(server);
  Sessions sessions = client->OpenBatch(Ragged(), QuickRetries(3));
  ASSERT_TRUE(sessions.at(0).ok()) << sessions[0].status();
  ASSERT_TRUE(sessions.at(2).ok()) << sessions[2].status();
  const absl::Status status = sessions.at(1).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(), "no room");
  EXPECT_EQ(RetryAfter(status), absl::Milliseconds(1234));
  for (const size_t i : {0, 2}) {
    ASSERT_TRUE(SendAll(**sessions[i]).ok());
  }
  for (const size_t i : {0, 2}) ExpectAnswered(**sessions[i]);
  EXPECT_EQ(server.attempts(), 1) << "those admitted may hold the room";
}

TEST(RefusedTest, TriesThoseAgainThatMayBeWhereNoneWasAdmitted) {
  absl::Mutex mutex;
  std::vector<std::string> keys;
  std::map<uint32_t, Received> received;
  FakeServer server([&](int attempt, grpc::ServerContext*, Stream* stream) {
    if (attempt > 1) return BehaveInBatch(stream, &received);
    for (uint32_t i = 0; i < 3; ++i) {
      keys.push_back(NextOpen(stream).idempotency_key());
      if (i == 1) {
        SendFailed(stream, i, grpc::StatusCode::INVALID_ARGUMENT, "bad");
      } else {
        SendFailed(stream, i, grpc::StatusCode::RESOURCE_EXHAUSTED, "no room", 1);
      }
    }
    v1::CompressRequest request;
    EXPECT_FALSE(stream->Read(&request)) << "nothing but the half-close is due";
    return grpc::Status::OK;
  });
  const auto client = ClientOf(server);
  StreamOptions options = QuickRetries(2);
  options.retry.initial_backoff = absl::Hours(1);  // the server's word goes before
  Sessions sessions = client->OpenBatch(Ragged(), options);
  EXPECT_EQ(sessions.at(1).status(), absl::InvalidArgumentError("bad"));
  for (const size_t i : {0, 2}) {
    ASSERT_TRUE(sessions[i].ok()) << sessions[i].status();
    ASSERT_TRUE(SendAll(**sessions[i]).ok());
    ExpectAnswered(**sessions[i]);
  }
  EXPECT_EQ(server.attempts(), 2);
  ASSERT_EQ(received.size(), 2U);
  EXPECT_EQ(received[0].open.batch_prompt_count(), 2U);
  EXPECT_EQ(received[0].open.idempotency_key(), keys.at(0));
  EXPECT_EQ(received[1].open.idempotency_key(), keys.at(2));
}

TEST(RefusedTest, WithoutAHintIsForEver) {
  FakeServer server([](int, grpc::ServerContext*, Stream* stream) {
    std::map<uint32_t, Received> received;
    for (uint32_t i = 0; i < 3; ++i) {
      SendFailed(stream, i, grpc::StatusCode::RESOURCE_EXHAUSTED, "larger than the budget");
    }
    return grpc::Status::OK;
  });
  const auto client = ClientOf(server);
  for (const auto& session : client->OpenBatch(Ragged(), QuickRetries(3))) {
    EXPECT_EQ(session.status(), absl::ResourceExhaustedError("larger than the budget"));
    EXPECT_EQ(RetryAfter(session.status()), std::nullopt);
  }
  EXPECT_EQ(server.attempts(), 1);
}

TEST(RefusedTest, AServerThatIsGoneFailsAll) {
  std::map<uint32_t, Received> received;
  FakeServer server([&](int attempt, grpc::ServerContext*, Stream* stream) {
    if (attempt == 3) return BehaveInBatch(stream, &received);
    NextOpen(stream);
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "draining");
  });
  const auto client = ClientOf(server);
  for (const auto& session : client->OpenBatch(Ragged(), QuickRetries(2))) {
    EXPECT_EQ(session.status(), absl::UnavailableError("draining"));
  }
  for (auto& session : client->OpenBatch(Ragged(), QuickRetries(2))) {
    ASSERT_TRUE(session.ok()) << session.status();
    ASSERT_TRUE(SendAll(**session).ok());
    ExpectAnswered(**session);
  }
}

// StreamBatch: what found no room beside the others has it once these are over.
TEST(RefusedTest, IsTriedAgainOnceTheOthersAreOver) {
  std::map<uint32_t, Received> first;
  std::map<uint32_t, Received> second;
  std::atomic<bool> over = false;
  FakeServer server([&](int attempt, grpc::ServerContext*, Stream* stream) {
    if (attempt == 2) {
      EXPECT_TRUE(over);
      return BehaveInBatch(stream, &second);
    }
    SendFailed(stream, 0, grpc::StatusCode::RESOURCE_EXHAUSTED, "no room", 1);
    NextOpen(stream);
    return BehaveInBatch(stream, &first);
  });
  std::vector<BatchPrompt> prompts = Ragged();
  prompts[1].options.on_event = [&](const Event& event) {
    if (std::holds_alternative<v1::Summary>(event)) over = true;
  };
  const auto client = ClientOf(server);
  for (const auto& summary : StreamBatch(*client, prompts, Zeros, QuickRetries(2))) {
    EXPECT_TRUE(summary.ok()) << summary.status();
  }
  EXPECT_EQ(server.attempts(), 2);
  EXPECT_EQ(first.size(), 2U);
  ASSERT_EQ(second.size(), 1U);
  EXPECT_EQ(second[0].open.prompt_tokens(), 6U);
}

// Where the server goes away, with some prompts admitted already, before their first result or
// after.
TEST(LostTest, SendsThePromptsAgainThatHaveNoResultYet) {
  std::map<uint32_t, Received> received;
  FakeServer server([&](int attempt, grpc::ServerContext*, Stream* stream) {
    if (attempt == 3) return BehaveInBatch(stream, &received);
    std::vector<v1::Open> opens;
    for (uint32_t i = 0; i < 3; ++i) {
      opens.push_back(NextOpen(stream));
      if (attempt == 1 && i == 1) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone");
      SendOpened(stream, OpenedFor(opens.back()), i);
    }
    stream->Write(LayerResponse(opens[1], 0, 1));
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone");
  });
  const auto client = ClientOf(server);
  const auto summaries = StreamBatch(*client, Ragged(), Zeros, QuickRetries(3));
  EXPECT_EQ(server.attempts(), 3);
  EXPECT_TRUE(summaries.at(0).ok()) << summaries[0].status();
  EXPECT_EQ(summaries.at(1).status(), absl::UnavailableError("gone"));
  EXPECT_TRUE(summaries.at(2).ok()) << summaries[2].status();
  EXPECT_EQ(received.size(), 2U);
}

// ---- One that fails on the way ----

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

// ---- Cancelled and dropped ones ----

// Sessions of a batch that `server` takes part in until all is over.
class LeavingTest : public ::testing::Test {
 protected:
  LeavingTest()
      : server_([this](int, grpc::ServerContext* context, Stream* stream) {
          const grpc::Status status = BehaveInBatch(stream, &received_);
          cancelled_ = context->IsCancelled();
          ended_.Notify();
          return status;
        }),
        client_(ClientOf(server_)) {}

  std::map<uint32_t, Received> received_;
  bool cancelled_ = false;
  absl::Notification ended_;
  FakeServer server_;
  std::unique_ptr<Client> client_;
};

TEST_F(LeavingTest, CancelEndsOnePrompt) {
  Sessions sessions = client_->OpenBatch(Ragged());
  for (const auto& session : sessions) ASSERT_TRUE(session.ok()) << session.status();
  CompressSession& left = **sessions[0];
  ASSERT_TRUE(SendLayer(left, 0).ok());
  left.Cancel();
  EXPECT_EQ(left.Wait().status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(SendLayer(left, 1).code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(left.Commit().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(left.NextEvent().status().code(), absl::StatusCode::kCancelled);
  for (const size_t i : {1, 2}) {
    ASSERT_TRUE(SendAll(**sessions[i]).ok());
    ExpectAnswered(**sessions[i]);
    EXPECT_TRUE((*sessions[i])->Wait().ok());
  }
  ended_.WaitForNotification();
  EXPECT_FALSE(cancelled_);
  EXPECT_TRUE(received_[0].committed);
  EXPECT_EQ(received_[0].commit.layer_count(), 0U) << "the server was told";
}

TEST_F(LeavingTest, DroppingOneLeavesTheOthers) {
  std::vector<BatchPrompt> prompts = Ragged();
  auto alive = std::make_shared<int>();
  prompts[1].options.on_event = [alive](const Event&) {};
  const std::weak_ptr<int> watch = alive;
  Sessions sessions = client_->OpenBatch(prompts);
  prompts.clear();
  alive.reset();
  for (const auto& session : sessions) ASSERT_TRUE(session.ok()) << session.status();
  ASSERT_TRUE(SendLayer(**sessions[1], 0).ok());
  EXPECT_FALSE(watch.expired());
  sessions[1]->reset();
  EXPECT_TRUE(watch.expired());
  for (const size_t i : {0, 2}) {
    ASSERT_TRUE(SendAll(**sessions[i]).ok());
    ExpectAnswered(**sessions[i]);
  }
  ended_.WaitForNotification();
  EXPECT_FALSE(cancelled_);
}

// The results of a prompt that nobody wants any more do not hold the others' up.
TEST_F(LeavingTest, DroppingOneFreesTheReader) {
  StreamOptions options;
  options.max_buffered_result_bytes = 1000;
  Sessions sessions = client_->OpenBatch({PromptOf(6, 200), PromptOf(6, 200)}, options);
  ASSERT_TRUE(sessions[0].ok() && sessions[1].ok());
  ASSERT_TRUE(SendAll(**sessions[0]).ok());
  ASSERT_TRUE((*sessions[0])->NextEvent().ok());
  std::thread reader([&] { ExpectAnswered(**sessions[1]); });
  ASSERT_TRUE(SendAll(**sessions[1]).ok());
  sessions[0]->reset();
  reader.join();
}

TEST_F(LeavingTest, TheLastOneCancelsTheStream) {
  Sessions sessions = client_->OpenBatch(Ragged());
  for (const auto& session : sessions) ASSERT_TRUE(session.ok()) << session.status();
  sessions[2]->reset();
  (*sessions[0])->Cancel();
  (*sessions[1])->Cancel();
  ended_.WaitForNotification();
  EXPECT_TRUE(cancelled_);
}

// In the middle of everything, from every thread.
TEST(LeavingManyTest, AtAnyTime) {
  FakeServer server([](int, grpc::ServerContext*, Stream* stream) {
    std::map<uint32_t, Received> received;
    return BehaveInBatch(stream, &received);
  });
  const auto client = ClientOf(server);
  const std::vector<BatchPrompt> prompts(6, PromptOf(200, 30));
  StreamOptions options;
  options.chunk_bytes = 1000;
  options.max_in_flight_bytes = 4000;
  options.max_buffered_result_bytes = 2000;
  for (int round = 0; round < 60; ++round) {
    Sessions sessions = client->OpenBatch(prompts, options);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < sessions.size(); ++i) {
      ASSERT_TRUE(sessions[i].ok()) << sessions[i].status();
      const bool leaves = i % 2 == 1;
      threads.emplace_back([&session = *sessions[i], leaves, round, i] {
        std::thread reader([&session, leaves] {
          while (true) {
            const auto event = session->NextEvent();
            if (!event.ok()) {
              // Who leaves may have come to the end before.
              const bool left = leaves && absl::IsCancelled(event.status());
              EXPECT_TRUE(left || absl::IsOutOfRange(event.status())) << event.status();
              return;
            }
          }
        });
        std::thread canceller([&session, leaves, round, i] {
          absl::SleepFor(absl::Microseconds(50) * round * static_cast<double>(i));
          if (leaves) session->Cancel();
        });
        const absl::Status status = SendAll(*session);
        EXPECT_TRUE(leaves || status.ok()) << status;
        canceller.join();
        reader.join();
        if (round % 2 == 0) session.reset();
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

// ---- Bounds ----

TEST(BoundTest, SendingOfAllPromptsTogetherBlocks) {
  FakeServer server([](int, grpc::ServerContext* context, Stream* stream) {
    for (uint32_t i = 0; i < 3; ++i) SendOpened(stream, OpenedFor(NextOpen(stream)), i);
    while (!context->IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
    return grpc::Status::CANCELLED;
  });
  const auto client = ClientOf(server);
  StreamOptions options;
  options.timeout = absl::Milliseconds(500);
  options.max_in_flight_bytes = 4 << 20;
  Sessions sessions = client->OpenBatch(Ragged(), options);
  std::atomic<int> sent = 0;
  std::vector<std::thread> threads;
  for (auto& session : sessions) {
    ASSERT_TRUE(session.ok()) << session.status();
    threads.emplace_back([&] {
      const std::vector<std::byte> data(1 << 20);
      absl::Status status;
      while (sent < 1000 && status.ok()) {
        status = (*session)->Send(0, v1::TENSOR_KEYS, data);
        if (status.ok()) ++sent;
      }
      EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LT(sent, 64) << "MiB were taken in without anybody reading them";
}

TEST(BoundTest, CancelFreesASenderThatIsBlocked) {
  FakeServer server([](int, grpc::ServerContext* context, Stream* stream) {
    for (uint32_t i = 0; i < 3; ++i) SendOpened(stream, OpenedFor(NextOpen(stream)), i);
    while (!context->IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
    return grpc::Status::CANCELLED;
  });
  const auto client = ClientOf(server);
  StreamOptions options;
  options.max_in_flight_bytes = 1 << 20;
  Sessions sessions = client->OpenBatch(Ragged(), options);
  ASSERT_TRUE(sessions.at(0).ok()) << sessions[0].status();
  absl::Status status;
  std::thread sender([&] {
    const std::vector<std::byte> data(1 << 20);
    while (status.ok()) status = (*sessions[0])->Send(0, v1::TENSOR_KEYS, data);
  });
  absl::SleepFor(absl::Milliseconds(20));
  (*sessions[0])->Cancel();
  sender.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
}

// ---- Pulls ----

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
