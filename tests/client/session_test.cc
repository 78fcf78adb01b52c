// A session against a server that behaves: what is sent, what is received, and in which order.
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "structkv/sizes.h"
#include "tests/client/fake_server.h"

namespace structkv::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string AsText(const Bytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

constexpr v1::Tensor kInputs[] = {v1::TENSOR_WINDOW_QUERIES, v1::TENSOR_KEYS, v1::TENSOR_VALUES};

// A server that behaves, a client, and what the server has received.
class SessionTest : public ::testing::Test {
 protected:
  SessionTest()
      : server_([this](int, grpc::ServerContext*, Stream* stream) {
          return Behave(stream, &received_);
        }),
        client_(*Client::Connect(server_.address())) {}

  // Sends all tensors of a layer through SendLayer, which must hold them itself.
  static absl::Status SendLayer(CompressSession& session, uint32_t layer) {
    std::vector<std::string> data;
    for (v1::Tensor tensor : kInputs) {
      data.push_back(
          TestTensor(layer, tensor, InputTensorBytes(session.open(), session.opened(), tensor)));
    }
    LayerTensors tensors;
    tensors.window_queries = AsBytes(data[0]);
    tensors.keys = AsBytes(data[1]);
    tensors.values = AsBytes(data[2]);
    return session.SendLayer(layer, tensors);
  }

  void ExpectAllReceived(const v1::Open& open) {
    const v1::Opened opened = OpenedFor(open);
    uint64_t total = 0;
    for (uint32_t layer = 0; layer < open.geometry().layer_count(); ++layer) {
      for (v1::Tensor tensor : kInputs) {
        const std::string want = TestTensor(layer, tensor, InputTensorBytes(open, opened, tensor));
        EXPECT_EQ((received_.tensors[{layer, tensor}]), want)
            << "layer " << layer << " tensor " << tensor;
        total += want.size();
      }
    }
    EXPECT_TRUE(received_.committed);
    EXPECT_EQ(received_.commit.layer_count(), open.geometry().layer_count());
    EXPECT_EQ(received_.commit.input_bytes(), total);
  }

  Received received_;
  FakeServer server_;
  std::unique_ptr<Client> client_;
};

TEST_F(SessionTest, CollectsWhatTheServerAnswers) {
  const v1::Open open = SmallOpen();
  auto session = client_->OpenPrompt(open);
  ASSERT_TRUE(session.ok()) << session.status();
  EXPECT_EQ((*session)->opened().session_id(), "session-1");
  ASSERT_TRUE(SendLayer(**session, 0).ok());
  ASSERT_TRUE(SendLayer(**session, 1).ok());
  ASSERT_TRUE((*session)->Commit().ok());
  const auto result = (*session)->Collect();
  ASSERT_TRUE(result.ok()) << result.status();
  ExpectAllReceived(open);
  ASSERT_EQ(result->layers.size(), 2);
  for (uint32_t layer = 0; layer < 2; ++layer) {
    const LayerResult& got = result->layers[layer];
    EXPECT_EQ(got.layer, layer);
    EXPECT_EQ(got.kept_tokens, 3);
    EXPECT_THAT(got.position_values(), ElementsAre(0, 2, 4));
    EXPECT_EQ(AsText(got.keys), TestTensor(layer + 100, v1::TENSOR_KEYS, 48));
    EXPECT_EQ(AsText(got.values), TestTensor(layer + 100, v1::TENSOR_VALUES, 48));
    ASSERT_TRUE(got.metrics.has_value());
    EXPECT_EQ(got.metrics->entropy(), 1.5 + layer);
  }
  EXPECT_FALSE(result->pivot.has_value());
  EXPECT_EQ(result->summary.kv_length(), 3);
}

TEST_F(SessionTest, FillsInAnIdempotencyKey) {
  auto session = client_->OpenPrompt(SmallOpen());
  ASSERT_TRUE(session.ok());
  EXPECT_EQ((*session)->open().idempotency_key().size(), 32);
  session->reset();
  v1::Open open = SmallOpen();
  open.set_idempotency_key("mine");
  session = client_->OpenPrompt(open);
  ASSERT_TRUE(session.ok());
  EXPECT_EQ((*session)->open().idempotency_key(), "mine");
}

// Sends layer 1 as skeleton rows of `skeleton_tokens`; the server answers as ever.
struct SkeletonRun {
  Received received;
  absl::Status status;
};

SkeletonRun RunSkeletonRows(uint32_t skeleton_tokens) {
  SkeletonRun run;
  FakeServer server([&](int, grpc::ServerContext*, Stream* stream) {
    if (!ReadOpen(stream, &run.received)) return grpc::Status::CANCELLED;
    v1::Opened opened = OpenedFor(run.received.open);
    opened.set_skeleton_tokens(skeleton_tokens);
    SendOpened(stream, opened);
    ReadToCommit(stream, &run.received);
    for (uint32_t layer = 0; layer < 2; ++layer) {
      stream->Write(LayerResponse(run.received.open, layer));
    }
    SendSummary(stream, SummaryFor(run.received.open, opened, run.received.commit.input_bytes()));
    return grpc::Status::OK;
  });
  auto client = *Client::Connect(server.address());
  auto session = client->OpenPrompt(SmallOpen());
  if (!session.ok()) return {run.received, session.status()};
  const std::vector<int32_t> skeleton(skeleton_tokens, 5);
  for (uint32_t layer = 0; layer < 2; ++layer) {
    std::vector<std::string> data;
    for (v1::Tensor tensor : kInputs) {
      const auto& opened = (*session)->opened();
      const uint64_t bytes = layer == 0 ? InputTensorBytes((*session)->open(), opened, tensor)
                                        : SkeletonTensorBytes((*session)->open(), opened, tensor);
      data.push_back(TestTensor(layer, tensor, bytes));
    }
    LayerTensors tensors;
    tensors.window_queries = AsBytes(data[0]);
    tensors.keys = AsBytes(data[1]);
    tensors.values = AsBytes(data[2]);
    if (layer == 1) tensors.positions = skeleton;
    run.status.Update((*session)->SendLayer(layer, tensors));
  }
  run.status.Update((*session)->Commit());
  run.status.Update((*session)->Collect().status());
  return run;
}

TEST(SkeletonRowsTest, PositionsAreSentAndCounted) {
  const SkeletonRun run = RunSkeletonRows(4);
  ASSERT_TRUE(run.status.ok()) << run.status;
  const auto& tensors = run.received.tensors;
  EXPECT_EQ(tensors.at({1, v1::TENSOR_POSITIONS}),
            std::string("\5\0\0\0\5\0\0\0\5\0\0\0\5\0\0\0", 16));
  EXPECT_EQ(tensors.at({1, v1::TENSOR_KEYS}).size(), 4 * 4 * sizeof(float));
  EXPECT_EQ(tensors.at({0, v1::TENSOR_KEYS}).size(), 6 * 4 * sizeof(float));
  uint64_t bytes = 0;
  for (const auto& [key, tensor] : tensors) bytes += tensor.size();
  EXPECT_EQ(run.received.commit.input_bytes(), bytes);
}

TEST(SkeletonRowsTest, ALayerKeepsAtMostTheSkeleton) {
  const SkeletonRun run = RunSkeletonRows(2);
  EXPECT_EQ(run.status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(run.status.message()), HasSubstr("layer 1 keeps 3 tokens"));
}

TEST_F(SessionTest, PacksASmallLayerIntoOneMessage) {
  auto session = client_->OpenPrompt(SmallOpen());
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE(SendLayer(**session, 0).ok());
  ASSERT_TRUE(SendLayer(**session, 1).ok());
  ASSERT_TRUE((*session)->Commit().ok());
  ASSERT_TRUE((*session)->Wait().ok());
  EXPECT_EQ(received_.messages, 2);
}

TEST_F(SessionTest, CutsTensorsToTheChunkSize) {
  v1::Open open = SmallOpen();
  open.set_prompt_tokens(1000);
  SessionOptions options;
  options.chunk_bytes = 1000;
  options.checksums = true;
  auto session = client_->OpenPrompt(open, options);
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE(SendLayer(**session, 0).ok());
  ASSERT_TRUE(SendLayer(**session, 1).ok());
  ASSERT_TRUE((*session)->Commit().ok());
  const auto summary = (*session)->Wait();
  ASSERT_TRUE(summary.ok()) << summary.status();
  ExpectAllReceived(open);
  EXPECT_LE(received_.longest_message, 1200);
  EXPECT_GE(received_.messages, 2 * 33);
  EXPECT_GE(received_.checksums, received_.messages) << "every piece has one, and it is right";
}

TEST_F(SessionTest, SendsPiecesInAnyOrderAndCountsRepeatedBytesOnce) {
  const v1::Open open = SmallOpen();
  auto session = client_->OpenPrompt(open);
  ASSERT_TRUE(session.ok());
  for (uint32_t layer : {1U, 0U}) {
    for (v1::Tensor tensor : kInputs) {
      const std::string data =
          TestTensor(layer, tensor, InputTensorBytes(open, (*session)->opened(), tensor));
      const auto bytes = AsBytes(data);
      ASSERT_TRUE((*session)->Send(layer, tensor, bytes.subspan(30), 30).ok());
      ASSERT_TRUE((*session)->Send(layer, tensor, bytes.subspan(0, 30)).ok());
      ASSERT_TRUE((*session)->Send(layer, tensor, bytes.subspan(10, 30), 10).ok());
    }
  }
  ASSERT_TRUE((*session)->Commit().ok());
  ASSERT_TRUE((*session)->Wait().ok());
  ExpectAllReceived(open);
}

TEST_F(SessionTest, RefusesToSendAfterTheCommitAndToSendNothing) {
  auto session = client_->OpenPrompt(SmallOpen());
  ASSERT_TRUE(session.ok());
  const absl::Status nothing = (*session)->Send(0, v1::TENSOR_KEYS, {});
  EXPECT_EQ(nothing.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(nothing.message()), HasSubstr("TENSOR_KEYS"));
  ASSERT_TRUE(SendLayer(**session, 0).ok());
  ASSERT_TRUE((*session)->Commit().ok());
  EXPECT_EQ((*session)->Commit().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(SendLayer(**session, 1).code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(SessionTest, GivesEventsInOrderAndNothingAfterTheSummary) {
  auto session = client_->OpenPrompt(SmallOpen());
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE(SendLayer(**session, 0).ok());
  ASSERT_TRUE(SendLayer(**session, 1).ok());
  ASSERT_TRUE((*session)->Commit().ok());
  for (uint32_t layer : {0U, 1U}) {
    const auto event = (*session)->NextEvent();
    ASSERT_TRUE(event.ok()) << event.status();
    ASSERT_TRUE(std::holds_alternative<LayerResult>(*event));
    EXPECT_EQ(std::get<LayerResult>(*event).layer, layer);
  }
  const auto last = (*session)->NextEvent();
  ASSERT_TRUE(last.ok());
  EXPECT_TRUE(std::holds_alternative<v1::Summary>(*last));
  EXPECT_EQ((*session)->NextEvent().status().code(), absl::StatusCode::kOutOfRange);
}

TEST_F(SessionTest, HandsEventsToTheCallback) {
  std::vector<size_t> kinds;
  std::vector<absl::Status> ends;
  SessionOptions options;
  options.on_event = [&](const Event& event) {
    EXPECT_TRUE(ends.empty());
    kinds.push_back(event.index());
  };
  options.on_end = [&ends](const absl::Status& status) { ends.push_back(status); };
  auto session = client_->OpenPrompt(SmallOpen(), options);
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE(SendLayer(**session, 0).ok());
  ASSERT_TRUE(SendLayer(**session, 1).ok());
  ASSERT_TRUE((*session)->Commit().ok());
  ASSERT_TRUE((*session)->Wait().ok());
  EXPECT_THAT(kinds, ElementsAre(0, 0, 2));
  EXPECT_THAT(ends, ElementsAre(absl::OkStatus()));
  EXPECT_EQ((*session)->NextEvent().status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(SessionTest, SaysWhenAnEventIsThere) {
  SessionOptions options;
  std::atomic<int> ready = 0;
  absl::Notification over;
  options.on_ready = [&] { ++ready; };
  options.on_end = [&](const absl::Status&) { over.Notify(); };
  auto session = client_->OpenPrompt(SmallOpen(), options);
  ASSERT_TRUE(session.ok()) << session.status();
  ASSERT_TRUE(SendLayer(**session, 0).ok());
  ASSERT_TRUE(SendLayer(**session, 1).ok());
  ASSERT_TRUE((*session)->Commit().ok());
  over.WaitForNotification();
  int events = 0;
  while (!std::holds_alternative<v1::Summary>(*(*session)->NextEvent())) ++events;
  EXPECT_EQ(ready.load(), events);
  EXPECT_GT(events, 1);
}

TEST_F(SessionTest, SaysHowACancelledSessionEnded) {
  std::vector<absl::StatusCode> ends;
  SessionOptions options;
  options.on_end = [&ends](const absl::Status& status) { ends.push_back(status.code()); };
  auto session = client_->OpenPrompt(SmallOpen(), options);
  ASSERT_TRUE(session.ok());
  EXPECT_TRUE(ends.empty());
  (*session)->Cancel();
  EXPECT_THAT(ends, ElementsAre(absl::StatusCode::kCancelled));
  session->reset();
  EXPECT_EQ(ends.size(), 1U);
}

// Nothing has to be sent: the answers may be there before the caller knows what was opened.
TEST(PlanOfNothingTest, NoEventComesBeforeOnOpenedHasReturned) {
  absl::Notification answered;
  Received received;
  FakeServer server([&](int, grpc::ServerContext*, Stream* stream) -> grpc::Status {
    ReadOpen(stream, &received);
    v1::Opened opened = OpenedFor(received.open);
    opened.clear_required_tensors();
    SendOpened(stream, opened);
    for (uint32_t layer = 0; layer < 2; ++layer) {
      stream->Write(LayerResponse(received.open, layer));
    }
    answered.Notify();
    ReadToCommit(stream, &received);
    SendSummary(stream, SummaryFor(received.open, opened, 0));
    return grpc::Status::OK;
  });
  const auto client = *Client::Connect(server.address());
  std::atomic<bool> opened{false};
  std::atomic<int> early{0};
  std::atomic<int> events{0};
  SessionOptions options;
  options.on_opened = [&](const v1::Opened&) {
    answered.WaitForNotification();
    absl::SleepFor(absl::Milliseconds(50));  // for what should not come
    opened = true;
  };
  options.on_event = [&](const Event&) {
    if (!opened) ++early;
    ++events;
  };
  auto session = client->OpenPrompt(SmallOpen(), options);
  ASSERT_TRUE(session.ok()) << session.status();
  ASSERT_TRUE((*session)->Commit().ok());
  const auto summary = (*session)->Wait();
  ASSERT_TRUE(summary.ok()) << summary.status();
  EXPECT_EQ(early, 0);
  EXPECT_EQ(events, 3);
  EXPECT_EQ(received.commit.layer_count(), 2) << "layers that need nothing count as sent";
}

TEST_F(SessionTest, KeepsTheOwnerUntilTheBytesAreSentAndNoLonger) {
  const v1::Open open = SmallOpen();
  std::weak_ptr<std::string> watch;
  {
    auto session = client_->OpenPrompt(open);
    ASSERT_TRUE(session.ok());
    for (uint32_t layer = 0; layer < 2; ++layer) {
      for (v1::Tensor tensor : kInputs) {
        auto data = std::make_shared<std::string>(
            TestTensor(layer, tensor, InputTensorBytes(open, (*session)->opened(), tensor)));
        watch = data;
        ASSERT_TRUE((*session)->Send(layer, tensor, AsBytes(*data), 0, data).ok());
      }
    }
    ASSERT_TRUE((*session)->Commit().ok());
    ASSERT_TRUE((*session)->Wait().ok());
  }
  ExpectAllReceived(open);
  for (int i = 0; i < 5000 && !watch.expired(); ++i) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_TRUE(watch.expired());
}

TEST_F(SessionTest, WritesResultsWhereTheAllocatorSays) {
  std::vector<std::byte> memory(4096);
  size_t used = 0;
  SessionOptions options;
  options.allocate = [&](uint32_t, v1::Tensor, size_t size) {
    Bytes bytes(memory.data() + used, size, nullptr);
    used += (size + 63) / 64 * 64;
    return bytes;
  };
  auto session = client_->OpenPrompt(SmallOpen(), options);
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE(SendLayer(**session, 0).ok());
  ASSERT_TRUE(SendLayer(**session, 1).ok());
  ASSERT_TRUE((*session)->Commit().ok());
  const auto result = (*session)->Collect();
  ASSERT_TRUE(result.ok()) << result.status();
  for (const LayerResult& layer : result->layers) {
    EXPECT_GE(layer.keys.data(), memory.data());
    EXPECT_LT(layer.keys.data(), memory.data() + memory.size());
    EXPECT_EQ(AsText(layer.keys), TestTensor(layer.layer + 100, v1::TENSOR_KEYS, 48));
  }
}

TEST_F(SessionTest, RefusesAnAllocationThatIsTooSmall) {
  SessionOptions options;
  options.allocate = [](uint32_t, v1::Tensor, size_t) { return Bytes(); };
  auto session = client_->OpenPrompt(SmallOpen(), options);
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE(SendLayer(**session, 0).ok());
  ASSERT_TRUE(SendLayer(**session, 1).ok());
  ASSERT_TRUE((*session)->Commit().ok());
  const absl::Status status = (*session)->Collect().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("allocate gave 0 bytes for positions; 12"));
}

TEST_F(SessionTest, CompressesAPromptInOneCall) {
  const v1::Open open = SmallOpen();
  v1::Opened opened;
  SessionOptions options;
  options.on_opened = [&opened](const v1::Opened& o) { opened = o; };
  std::vector<std::string> data;
  data.reserve(6);
  const auto source = [&](uint32_t layer) -> absl::StatusOr<LayerTensors> {
    LayerTensors tensors;
    const auto make = [&](v1::Tensor tensor) {
      data.push_back(TestTensor(layer, tensor, InputTensorBytes(open, opened, tensor)));
      return AsBytes(data.back());
    };
    tensors.window_queries = make(v1::TENSOR_WINDOW_QUERIES);
    tensors.keys = make(v1::TENSOR_KEYS);
    tensors.values = make(v1::TENSOR_VALUES);
    return tensors;
  };
  const auto result = CompressPrompt(*client_, open, source, options);
  ASSERT_TRUE(result.ok()) << result.status();
  ExpectAllReceived(open);
  EXPECT_EQ(result->layers.size(), 2);
  EXPECT_EQ(result->opened.session_id(), "session-1");
  EXPECT_EQ(result->summary.kv_length(), 3);
}

TEST_F(SessionTest, FailsWithTheStatusOfTheSource) {
  const auto source = [](uint32_t) -> absl::StatusOr<LayerTensors> {
    return absl::NotFoundError("no such layer");
  };
  const absl::Status status = CompressPrompt(*client_, SmallOpen(), source).status();
  EXPECT_EQ(status, absl::NotFoundError("no such layer"));
}

TEST_F(SessionTest, SaysWhatTheServerCanDo) {
  const auto capabilities = client_->GetCapabilities();
  ASSERT_TRUE(capabilities.ok()) << capabilities.status();
  EXPECT_EQ(capabilities->version(), "1.2.3");
}

}  // namespace
}  // namespace structkv::client
