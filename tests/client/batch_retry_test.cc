// Prompts of a batch that are refused, or lose their server: which are tried again, and when.
#include <atomic>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "tests/client/batch_prompts.h"
#include "tests/client/fake_server.h"

namespace structkv::client {
namespace {

StreamOptions QuickRetries(int attempts) {
  StreamOptions options;
  options.retry.max_attempts = attempts;
  options.retry.initial_backoff = absl::Milliseconds(1);
  return options;
}

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

}  // namespace
}  // namespace structkv::client
