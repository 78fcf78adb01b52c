// Prompts of a batch that are cancelled or dropped, and the bounds that all of them share.
#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "tests/client/batch_prompts.h"
#include "tests/client/fake_server.h"

namespace structkv::client {
namespace {

using LeavingTest = BatchServerTest;

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

grpc::Status AdmitsAndReadsNothing(int /*attempt*/, grpc::ServerContext* context, Stream* stream) {
  for (uint32_t i = 0; i < 3; ++i) SendOpened(stream, OpenedFor(NextOpen(stream)), i);
  while (!context->IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
  return grpc::Status::CANCELLED;
}

TEST(BoundTest, SendingOfAllPromptsTogetherBlocks) {
  FakeServer server(AdmitsAndReadsNothing);
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
  FakeServer server(AdmitsAndReadsNothing);
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

}  // namespace
}  // namespace structkv::client
