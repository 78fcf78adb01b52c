// A session against a server that fails, stalls or lies.
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "grpcpp/generic/async_generic_service.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "structkv/sizes.h"
#include "tests/client/fake_server.h"

namespace structkv::client {
namespace {

using ::testing::HasSubstr;

constexpr char kPushback[] = "grpc-retry-pushback-ms";

SessionOptions QuickRetries(int attempts) {
  SessionOptions options;
  options.retry.max_attempts = attempts;
  options.retry.initial_backoff = absl::Milliseconds(1);
  return options;
}

// Sends a whole small prompt, as far as the server lets it, and collects.
absl::Status RunSmall(Client& client, const SessionOptions& options = QuickRetries(1)) {
  auto session = client.OpenPrompt(SmallOpen(), options);
  if (!session.ok()) return session.status();
  for (uint32_t layer = 0; layer < 2; ++layer) {
    const std::string data(96, 'x');
    LayerTensors tensors;
    tensors.keys = {reinterpret_cast<const std::byte*>(data.data()), data.size()};
    tensors.values = tensors.keys;
    tensors.window_queries = {tensors.keys.data(), 64};
    absl::Status status = (*session)->SendLayer(layer, tensors);
    if (!status.ok()) return status;
  }
  absl::Status status = (*session)->Commit();
  if (!status.ok()) return status;
  return (*session)->Collect().status();
}

// ---- What the server says against the protocol ----

struct Lie {
  const char* name;
  std::function<void(std::vector<v1::CompressResponse>*)> tell;
  const char* text;
};

void PrintTo(const Lie& lie, std::ostream* out) { *out << lie.name; }

class LyingServerTest : public ::testing::TestWithParam<Lie> {};

TEST_P(LyingServerTest, IsDataLoss) {
  FakeServer server([](int, grpc::ServerContext*, Stream* stream) {
    Received received;
    ReadOpen(stream, &received);
    const v1::Opened opened = OpenedFor(received.open);
    std::vector<v1::CompressResponse> responses(2);
    *responses[0].mutable_opened() = opened;
    responses.insert(responses.begin() + 1, LayerResponse(received.open, 0));
    responses.insert(responses.begin() + 2, LayerResponse(received.open, 1));
    *responses[3].mutable_summary() = SummaryFor(received.open, opened, 2 * (96 + 96 + 64));
    GetParam().tell(&responses);
    for (const v1::CompressResponse& response : responses) stream->Write(response);
    ReadToCommit(stream, &received);
    return grpc::Status::OK;
  });
  const absl::Status status = RunSmall(*ClientOf(server));
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().text));
}

using Responses = std::vector<v1::CompressResponse>;

const Lie kLies[] = {
    {"NoSummary", [](Responses* r) { r->pop_back(); }, "ended without a summary"},
    {"LayerMissing", [](Responses* r) { r->erase(r->begin() + 2); }, "after 1 of 2 layers"},
    {"LayerTwice", [](Responses* r) { r->insert(r->begin() + 2, (*r)[1]); }, "answered twice"},
    {"OpenedTwice", [](Responses* r) { r->insert(r->begin() + 1, (*r)[0]); }, "came twice"},
    {"NoOpened", [](Responses* r) { r->erase(r->begin()); }, "first message is not `opened`"},
    {"AfterSummary", [](Responses* r) { r->push_back((*r)[3]); }, "after the summary"},
    {"LayerPastTheEnd", [](Responses* r) { (*r)[1].mutable_layer()->set_layer(2); },
     "layer is 2 of 2"},
    {"OtherKept", [](Responses* r) { (*r)[1].mutable_layer()->set_kept_tokens(4); },
     "keeps 4 tokens, Opened said 3"},
    {"KeptBeyondPrompt", [](Responses* r) { (*r)[0].mutable_opened()->set_kept_tokens(0, 7); },
     "7 of 6 tokens"},
    {"OtherMethod",
     [](Responses* r) { (*r)[0].mutable_opened()->mutable_method()->mutable_full(); },
     "Opened.method"},
    {"KeptForOtherLayers", [](Responses* r) { (*r)[0].mutable_opened()->add_kept_tokens(3); },
     "3 entries for 2 layers"},
    {"Interrupted", [](Responses* r) { (*r)[1].mutable_layer()->set_complete(false); },
     "layer 0 was interrupted by layer 1"},
    {"InterruptedBySummary", [](Responses* r) { (*r)[2].mutable_layer()->set_complete(false); },
     "layer 1 was interrupted"},
    {"Gap", [](Responses* r) { (*r)[1].mutable_layer()->mutable_pieces(1)->set_offset_bytes(4); },
     "keys: a piece at 4"},
    {"TooLong",
     [](Responses* r) { (*r)[1].mutable_layer()->mutable_pieces(1)->mutable_data()->append("x"); },
     "keys: a piece at 0 of 49 bytes"},
    {"TooShort",
     [](Responses* r) { (*r)[1].mutable_layer()->mutable_pieces(2)->mutable_data()->pop_back(); },
     "47 of 48 bytes of values"},
    {"WrongPieceLayer",
     [](Responses* r) { (*r)[1].mutable_layer()->mutable_pieces(0)->set_layer(1); },
     "a piece of layer 1 came with layer 0"},
    {"WrongTensor",
     [](Responses* r) {
       (*r)[1].mutable_layer()->mutable_pieces(0)->set_tensor(v1::TENSOR_CENTRALITY);
     },
     "holds tensor 8"},
    {"Checksum", [](Responses* r) { (*r)[1].mutable_layer()->mutable_pieces(1)->set_xxh3_64(1); },
     "checksum mismatch"},
    {"PositionPastTheEnd",
     [](Responses* r) { (*r)[1].mutable_layer()->mutable_pieces(0)->mutable_data()->at(8) = 6; },
     "keeps position 6 of 6"},
    {"SummaryLayers", [](Responses* r) { (*r)[3].mutable_summary()->set_layer_count(1); },
     "Summary.layer_count is 1 of 2"},
    {"SummaryInput", [](Responses* r) { (*r)[3].mutable_summary()->set_input_bytes(511); },
     "Summary.input_bytes is 511, sent were 512"},
    {"SummaryOutput", [](Responses* r) { (*r)[3].mutable_summary()->set_output_bytes(1); },
     "Summary.output_bytes is 1, received were 216"},
    {"SummaryLogical", [](Responses* r) { (*r)[3].mutable_summary()->set_logical_length(5); },
     "Summary.logical_length is 5"},
    {"SummaryNext", [](Responses* r) { (*r)[3].mutable_summary()->set_next_position(3); },
     "Summary.next_position is 3"},
    {"SummaryKv", [](Responses* r) { (*r)[3].mutable_summary()->set_kv_length(2); },
     "Summary.kv_length is 2"},
    {"SummaryFingerprint", [](Responses* r) { (*r)[3].mutable_summary()->set_fingerprint("f"); },
     "Summary.fingerprint is f"},
};

INSTANTIATE_TEST_SUITE_P(All, LyingServerTest, ::testing::ValuesIn(kLies),
                         [](const auto& lie) { return std::string(lie.param.name); });

// Answers every call with bytes that are no message.
class GarbageService final : public grpc::CallbackGenericService {
 public:
  grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext*) override {
    class Reactor final : public grpc::ServerGenericBidiReactor {
     public:
      Reactor() : slice_(std::string("\xff\xff\xff garbage")), buffer_(&slice_, 1) {
        StartWrite(&buffer_);
        StartRead(&request_);
      }
      void OnReadDone(bool ok) override {
        if (ok) StartRead(&request_);
      }
      void OnCancel() override { Finish(grpc::Status::CANCELLED); }
      void OnDone() override { delete this; }

     private:
      grpc::Slice slice_;
      grpc::ByteBuffer buffer_;
      grpc::ByteBuffer request_;
    };
    return new Reactor();
  }
};

TEST(GarbageServerTest, IsDataLoss) {
  GarbageService service;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterCallbackGenericService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  auto client = *Client::Connect("127.0.0.1:" + std::to_string(port));
  const absl::Status status = client->OpenPrompt(SmallOpen()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("cannot be read"));
  server->Shutdown(std::chrono::system_clock::now());
}

// ---- What the server refuses ----

TEST(ErrorTest, KeepsTheServersCodeAndText) {
  FakeServer server([](int, grpc::ServerContext*, Stream* stream) {
    Received received;
    ReadOpen(stream, &received);
    return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "Open.prompt_tokens is 0");
  });
  const absl::Status status = RunSmall(*ClientOf(server), QuickRetries(3));
  EXPECT_EQ(status, absl::InvalidArgumentError("Open.prompt_tokens is 0"));
  EXPECT_EQ(server.attempts(), 1) << "what is wrong stays wrong";
}

TEST(ErrorTest, EndsSendingWithTheServersStatus) {
  FakeServer server([](int, grpc::ServerContext*, Stream* stream) {
    Received received;
    ReadOpen(stream, &received);
    SendOpened(stream, OpenedFor(received.open));
    v1::CompressRequest request;
    stream->Read(&request);
    return grpc::Status(grpc::StatusCode::OUT_OF_RANGE, "layer 9 of 2");
  });
  auto client = ClientOf(server);
  auto session = client->OpenPrompt(SmallOpen());
  ASSERT_TRUE(session.ok());
  const std::vector<std::byte> data(1 << 20);
  absl::Status status;
  while (status.ok()) status = (*session)->Send(9, v1::TENSOR_KEYS, data);
  EXPECT_EQ(status, absl::OutOfRangeError("layer 9 of 2"));
  EXPECT_EQ((*session)->Commit(), status);
  EXPECT_EQ((*session)->Collect().status(), status);
  EXPECT_EQ((*session)->Wait().status(), status);
}

TEST(ErrorTest, NamesAServerThatIsNotThere) {
  auto client = *Client::Connect("unix:/nonexistent/structkv.sock");
  EXPECT_EQ(RunSmall(*client).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(client->GetCapabilities().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Client::Connect("").status().code(), absl::StatusCode::kInvalidArgument);
}

// ---- Trying again ----

TEST(RetryTest, TriesAgainWhileUnavailableWithTheSameKey) {
  std::vector<std::string> keys;
  Received last;
  FakeServer server([&](int attempt, grpc::ServerContext*, Stream* stream) {
    if (attempt == 3) {
      const grpc::Status status = Behave(stream, &last);
      keys.push_back(last.open.idempotency_key());
      return status;
    }
    Received received;
    ReadOpen(stream, &received);
    keys.push_back(received.open.idempotency_key());
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "draining");
  });
  const absl::Status status = RunSmall(*ClientOf(server), QuickRetries(3));
  EXPECT_TRUE(status.ok()) << status;
  ASSERT_EQ(keys.size(), 3);
  EXPECT_FALSE(keys[0].empty());
  EXPECT_EQ(keys[0], keys[1]);
  EXPECT_EQ(keys[0], keys[2]);
}

TEST(RetryTest, GivesUpAfterTheLastAttempt) {
  FakeServer server([](int, grpc::ServerContext*, Stream*) {
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "draining");
  });
  EXPECT_EQ(RunSmall(*ClientOf(server), QuickRetries(3)), absl::UnavailableError("draining"));
  EXPECT_EQ(server.attempts(), 3);
}

TEST(RetryTest, WaitsAsLongAsAnExhaustedServerSays) {
  Received received;
  FakeServer server([&](int attempt, grpc::ServerContext* context, Stream* stream) {
    if (attempt == 2) return Behave(stream, &received);
    context->AddTrailingMetadata(kPushback, "5");
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "memory");
  });
  SessionOptions options = QuickRetries(2);
  options.retry.initial_backoff = absl::Hours(1);  // the server's word goes before
  const absl::Status status = RunSmall(*ClientOf(server), options);
  EXPECT_TRUE(status.ok()) << status;
}

TEST(RetryTest, TakesAnExhaustedServerWithoutAHintAtItsWord) {
  FakeServer server([](int, grpc::ServerContext*, Stream*) {
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "message too large");
  });
  EXPECT_EQ(RunSmall(*ClientOf(server), QuickRetries(3)).code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(server.attempts(), 1);
}

TEST(RetryTest, HeedsAServerThatForbidsIt) {
  FakeServer server([](int, grpc::ServerContext* context, Stream*) {
    context->AddTrailingMetadata(kPushback, "-1");
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "no");
  });
  EXPECT_EQ(RunSmall(*ClientOf(server), QuickRetries(3)).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(server.attempts(), 1);
}

TEST(RetryTest, DoesNotOutlastTheDeadline) {
  FakeServer server([](int, grpc::ServerContext*, Stream*) {
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "draining");
  });
  SessionOptions options = QuickRetries(100);
  options.retry.initial_backoff = absl::Hours(1);
  options.retry.max_backoff = absl::Hours(1);
  options.timeout = absl::Seconds(20);
  EXPECT_EQ(RunSmall(*ClientOf(server), options), absl::UnavailableError("draining"));
  EXPECT_EQ(server.attempts(), 1);
}

absl::StatusOr<LayerTensors> SmallLayer(uint32_t /*layer*/) {
  static const std::byte data[96] = {};
  LayerTensors tensors;
  tensors.keys = data;
  tensors.values = data;
  tensors.window_queries = absl::MakeConstSpan(data, 64);
  return tensors;
}

// Admits a prompt, answers `answers` layers and goes away, once; then behaves.
Script LostOnce(int answers) {
  return [answers](int attempt, grpc::ServerContext*, Stream* stream) {
    Received received;
    if (attempt > 1) return Behave(stream, &received);
    ReadOpen(stream, &received);
    SendOpened(stream, OpenedFor(received.open));
    v1::CompressRequest request;
    stream->Read(&request);
    for (int layer = 0; layer < answers; ++layer) {
      stream->Write(LayerResponse(received.open, static_cast<uint32_t>(layer)));
    }
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone");
  };
}

TEST(RetryTest, SendsAWholePromptAgainBeforeItsFirstResult) {
  FakeServer server(LostOnce(0));
  const auto result = CompressPrompt(*ClientOf(server), SmallOpen(), SmallLayer, QuickRetries(2));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->layers.size(), 2);
  EXPECT_EQ(server.attempts(), 2);
}

TEST(RetryTest, NeverAfterTheFirstResult) {
  FakeServer server(LostOnce(1));
  const absl::Status status =
      CompressPrompt(*ClientOf(server), SmallOpen(), SmallLayer, QuickRetries(2)).status();
  EXPECT_EQ(status, absl::UnavailableError("gone"));
  EXPECT_EQ(server.attempts(), 1);
}

// ---- A server that stalls ----

// Admits the prompt and then neither reads nor writes until the call ends.
Script Stalls() {
  return [](int, grpc::ServerContext* context, Stream* stream) {
    Received received;
    ReadOpen(stream, &received);
    SendOpened(stream, OpenedFor(received.open));
    while (!context->IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
    return grpc::Status::CANCELLED;
  };
}

TEST(StallTest, OpeningEndsAtTheDeadline) {
  FakeServer server([](int, grpc::ServerContext* context, Stream*) {
    while (!context->IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
    return grpc::Status::CANCELLED;
  });
  SessionOptions options;
  options.timeout = absl::Milliseconds(100);
  EXPECT_EQ(RunSmall(*ClientOf(server), options).code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(StallTest, SendingBlocksWithinTheBoundAndEndsAtTheDeadline) {
  FakeServer server(Stalls());
  auto client = ClientOf(server);
  SessionOptions options;
  options.timeout = absl::Milliseconds(500);
  options.max_in_flight_bytes = 4 << 20;
  auto session = client->OpenPrompt(SmallOpen(), options);
  ASSERT_TRUE(session.ok()) << session.status();
  const std::vector<std::byte> data(1 << 20);
  absl::Status status;
  size_t sent = 0;
  while (sent < 1000) {
    status = (*session)->Send(0, v1::TENSOR_KEYS, data);
    if (!status.ok()) break;
    ++sent;
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_LT(sent, 64) << "MiB were taken in without anybody reading them";
}

TEST(StallTest, ReadingEndsAtTheDeadline) {
  FakeServer server(Stalls());
  auto client = ClientOf(server);
  SessionOptions options;
  options.timeout = absl::Milliseconds(200);
  auto session = client->OpenPrompt(SmallOpen(), options);
  ASSERT_TRUE(session.ok());
  EXPECT_EQ((*session)->NextEvent().status().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(StallTest, CancelFreesASenderThatIsBlocked) {
  FakeServer server(Stalls());
  auto client = ClientOf(server);
  SessionOptions options;
  options.max_in_flight_bytes = 1 << 20;
  auto session = client->OpenPrompt(SmallOpen(), options);
  ASSERT_TRUE(session.ok());
  absl::Status status;
  std::thread sender([&] {
    const std::vector<std::byte> data(1 << 20);
    while (status.ok()) status = (*session)->Send(0, v1::TENSOR_KEYS, data);
  });
  absl::SleepFor(absl::Milliseconds(20));
  (*session)->Cancel();
  sender.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
}

TEST(StallTest, DestroyingASessionCancelsItsStream) {
  absl::Notification cancelled;
  FakeServer server([&](int, grpc::ServerContext* context, Stream* stream) {
    Received received;
    ReadOpen(stream, &received);
    SendOpened(stream, OpenedFor(received.open));
    ReadToCommit(stream, &received);
    if (context->IsCancelled() && !received.committed) cancelled.Notify();
    return grpc::Status::CANCELLED;
  });
  auto client = ClientOf(server);
  auto session = client->OpenPrompt(SmallOpen());
  ASSERT_TRUE(session.ok());
  session->reset();
  EXPECT_TRUE(cancelled.WaitForNotificationWithTimeout(absl::Seconds(20)));
}

// Answers many layers at once.
Script Floods() {
  return [](int, grpc::ServerContext*, Stream* stream) {
    Received received;
    ReadOpen(stream, &received);
    SendOpened(stream, OpenedFor(received.open));
    for (uint32_t layer = 0; layer < received.open.geometry().layer_count(); ++layer) {
      if (!stream->Write(LayerResponse(received.open, layer))) break;
    }
    ReadToCommit(stream, &received);
    SendSummary(stream,
                SummaryFor(received.open, OpenedFor(received.open), received.commit.input_bytes()));
    return grpc::Status::OK;
  };
}

v1::Open ManyLayers() {
  v1::Open open = SmallOpen();
  open.mutable_geometry()->set_layer_count(500);
  return open;
}

TEST(BoundedResultsTest, ReadsOnWhenTheReaderComes) {
  FakeServer server(Floods());
  auto client = ClientOf(server);
  SessionOptions options;
  options.max_buffered_result_bytes = 300;
  auto session = client->OpenPrompt(ManyLayers(), options);
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE((*session)->Commit().ok());
  const auto result = (*session)->Collect();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->layers.size(), 500);
}

TEST(BoundedResultsTest, CanBeLeftUnread) {
  FakeServer server(Floods());
  auto client = ClientOf(server);
  SessionOptions options;
  options.max_buffered_result_bytes = 300;
  auto session = client->OpenPrompt(ManyLayers(), options);
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE((*session)->NextEvent().ok());
  session->reset();
}

TEST(OneThreadTest, MaySendEverythingBeforeItReadsAnything) {
  // The server answers each layer before it reads the next: it would wait for ever for a client
  // that reads only after it has sent everything.
  FakeServer server([](int, grpc::ServerContext*, Stream* stream) {
    Received received;
    ReadOpen(stream, &received);
    v1::Opened opened = OpenedFor(received.open);
    SendOpened(stream, opened);
    v1::CompressRequest request;
    uint64_t bytes = 0;
    for (uint32_t layer = 0; layer < received.open.geometry().layer_count(); ++layer) {
      for (int tensor = 0; tensor < 2; ++tensor) {
        stream->Read(&request);
        bytes += request.pieces().pieces(0).data().size();
      }
      stream->Write(LayerResponse(received.open, layer));
    }
    ReadToCommit(stream, &received);
    SendSummary(stream, SummaryFor(received.open, opened, bytes));
    return grpc::Status::OK;
  });
  auto client = ClientOf(server);
  v1::Open open = SmallOpen();
  open.mutable_geometry()->set_layer_count(40);
  open.mutable_geometry()->set_key_dim(32768);
  SessionOptions options;
  options.max_in_flight_bytes = 1 << 20;
  auto session = client->OpenPrompt(open, options);
  ASSERT_TRUE(session.ok());
  const std::vector<std::byte> data(6 * 32768 * 4);
  for (uint32_t layer = 0; layer < 40; ++layer) {
    ASSERT_TRUE((*session)->Send(layer, v1::TENSOR_KEYS, data).ok());
    ASSERT_TRUE((*session)->Send(layer, v1::TENSOR_VALUES, data).ok());
  }
  ASSERT_TRUE((*session)->Commit().ok());
  const auto result = (*session)->Collect();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->layers.size(), 40);
}

}  // namespace
}  // namespace structkv::client
