// A session whose rows are pulled, against a server that asks for them as it should, or as it
// should not.
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
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

constexpr size_t kRow = 16;           // 4 elements of f32
constexpr size_t kWhole = 6 * kRow;   // of a layer's keys or values
constexpr size_t kPulled = 3 * kRow;  // tokens 0, 2 and 4
constexpr size_t kQueryBytes = 2 * 2 * kRow;

v1::Open PullOpen() {
  v1::Open open = SmallOpen();
  open.set_pull(v1::PULL_VALUES);
  return open;
}

v1::Opened OpenedForPull(const v1::Open& open) {
  v1::Opened opened = OpenedFor(open);
  opened.clear_required_tensors();
  opened.add_required_tensors(v1::TENSOR_KEYS);
  opened.add_required_tensors(v1::TENSOR_WINDOW_QUERIES);
  opened.set_layers_in_flight(1);
  return opened;
}

v1::CompressResponse PullOf(uint32_t layer) {
  v1::CompressResponse response;
  v1::RowPull* pull = response.mutable_pull();
  pull->set_layer(layer);
  pull->set_kept_tokens(3);
  pull->add_tensors(v1::TENSOR_VALUES);
  pull->set_complete(true);
  const int32_t positions[] = {0, 2, 4};
  v1::TensorPiece* piece = pull->add_pieces();
  piece->set_layer(layer);
  piece->set_tensor(v1::TENSOR_POSITIONS);
  piece->set_data(positions, sizeof positions);
  return response;
}

std::string Values(uint32_t layer) { return TestTensor(layer, v1::TENSOR_VALUES, kWhole); }

std::string ValuesOfPull(uint32_t layer) {
  const std::string all = Values(layer);
  return all.substr(0, kRow) + all.substr(2 * kRow, kRow) + all.substr(4 * kRow, kRow);
}

// Reads pieces until the bytes of one tensor of a layer came, which nothing of a later layer may
// precede. False where the stream ended.
bool ReadTensor(Stream* stream, uint32_t layer, v1::Tensor tensor, size_t bytes, std::string* out) {
  v1::CompressRequest request;
  while (out->size() < bytes && stream->Read(&request)) {
    for (const v1::TensorPiece& piece : request.pieces().pieces()) {
      EXPECT_LE(piece.layer(), layer) << "ahead of the window";
      if (piece.layer() == layer && piece.tensor() == tensor) *out += piece.data();
    }
  }
  return out->size() == bytes;
}

// A server that asks for the rows of every layer, and hands back what it got.
struct PullingServer {
  grpc::Status operator()(int, grpc::ServerContext*, Stream* stream) {
    Received received;
    if (!ReadOpen(stream, &received)) return grpc::Status::CANCELLED;
    const v1::Opened opened = OpenedForPull(received.open);
    SendOpened(stream, opened);
    uint64_t input_bytes = 0;
    for (uint32_t layer = 0; layer < 2; ++layer) {
      std::string keys;
      if (!ReadTensor(stream, layer, v1::TENSOR_KEYS, kWhole, &keys)) return Broken();
      stream->Write(PullOf(layer));
      std::string rows;
      if (!ReadTensor(stream, layer, v1::TENSOR_VALUES, kPulled, &rows)) return Broken();
      input_bytes += kWhole + kQueryBytes + kPulled;
      const absl::MutexLock lock(&mutex);
      values.push_back(rows);
      stream->Write(LayerResponse(received.open, layer));
    }
    ReadToCommit(stream, &received);
    if (!received.committed) return Broken();
    EXPECT_EQ(received.commit.input_bytes(), input_bytes);
    v1::Summary summary = SummaryFor(received.open, OpenedFor(received.open), input_bytes);
    summary.set_output_bytes(summary.output_bytes() + 2 * 12);  // the positions of the pulls
    SendSummary(stream, summary);
    return grpc::Status::OK;
  }
  static grpc::Status Broken() { return {grpc::StatusCode::INVALID_ARGUMENT, "incomplete"}; }

  absl::Mutex mutex;
  std::vector<std::string> values;
};

class PullTest : public ::testing::Test {
 protected:
  PullTest()
      : server_([this](int attempt, grpc::ServerContext* context, Stream* stream) {
          return pulling_(attempt, context, stream);
        }),
        client_(*Client::Connect(server_.address())) {}

  static LayerTensors Tensors(const std::string& queries, const std::string& keys,
                              const std::string& values) {
    LayerTensors tensors;
    tensors.window_queries = AsBytes(queries);
    tensors.keys = AsBytes(keys);
    tensors.values = AsBytes(values);
    return tensors;
  }
  const std::string queries_ = std::string(kQueryBytes, 'q');
  const std::string keys_ = std::string(kWhole, 'k');

  PullingServer pulling_;
  FakeServer server_;
  std::unique_ptr<Client> client_;
};

TEST_F(PullTest, TakesTheRowsOutOfTheTensorsThatAreKeptAlive) {
  auto session = client_->OpenPrompt(PullOpen());
  ASSERT_TRUE(session.ok()) << session.status();
  const std::string all[] = {Values(0), Values(1)};
  const std::shared_ptr<const void> owner(all, [](const void*) {});
  std::weak_ptr<const void> watch;
  for (uint32_t layer = 0; layer < 2; ++layer) {
    LayerTensors tensors = Tensors(queries_, keys_, all[layer]);
    tensors.owner = std::make_shared<std::shared_ptr<const void>>(owner);
    watch = tensors.owner;
    ASSERT_TRUE((*session)->SendLayer(layer, tensors).ok());
  }
  ASSERT_TRUE((*session)->Commit().ok());
  const auto result = (*session)->Collect();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->layers.size(), 2U);
  EXPECT_THAT(pulling_.values, ElementsAre(ValuesOfPull(0), ValuesOfPull(1)));
  EXPECT_TRUE(watch.expired());
}

// Without an owner the caller's memory is its own again when SendLayer returns.
TEST_F(PullTest, WaitsForThePullWhereNobodyKeepsTheTensorsAlive) {
  auto session = client_->OpenPrompt(PullOpen());
  ASSERT_TRUE(session.ok()) << session.status();
  for (uint32_t layer = 0; layer < 2; ++layer) {
    std::string values = Values(layer);
    ASSERT_TRUE((*session)->SendLayer(layer, Tensors(queries_, keys_, values)).ok());
    values.assign(values.size(), 'x');
  }
  ASSERT_TRUE((*session)->Commit().ok());
  ASSERT_TRUE((*session)->Collect().ok());
  EXPECT_THAT(pulling_.values, ElementsAre(ValuesOfPull(0), ValuesOfPull(1)));
}

TEST_F(PullTest, AsksTheRowSourceWhereThereIsOne) {
  std::vector<std::string> rows;
  SessionOptions options;
  options.rows = [&](const RowPull& pull) -> absl::StatusOr<PulledRows> {
    EXPECT_EQ(pull.layer, rows.size());
    EXPECT_EQ(pull.kept_tokens, 3U);
    EXPECT_FALSE(pull.keys);
    EXPECT_THAT(pull.position_values(), ElementsAre(0, 2, 4));
    rows.push_back(std::string(kPulled, static_cast<char>('a' + pull.layer)));
    return PulledRows{{}, AsBytes(rows.back()), nullptr};
  };
  const auto source = [&](uint32_t) -> absl::StatusOr<LayerTensors> {
    return Tensors(queries_, keys_, "");
  };
  const auto result = CompressPrompt(*client_, PullOpen(), source, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(pulling_.values, ElementsAre(std::string(kPulled, 'a'), std::string(kPulled, 'b')));
}

TEST_F(PullTest, FailsWithTheRowSource) {
  SessionOptions options;
  options.rows = [](const RowPull&) -> absl::StatusOr<PulledRows> {
    return absl::NotFoundError("the cache is gone");
  };
  auto session = client_->OpenPrompt(PullOpen(), options);
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE((*session)->SendLayer(0, Tensors(queries_, keys_, "")).ok());
  EXPECT_EQ((*session)->SendLayer(1, Tensors(queries_, keys_, "")),
            absl::NotFoundError("the cache is gone"));
  EXPECT_EQ((*session)->Wait().status(), absl::NotFoundError("the cache is gone"));
}

TEST_F(PullTest, RefusesRowsOfTheWrongSize) {
  const std::string rows(kPulled - 1, 'r');
  SessionOptions options;
  options.rows = [&](const RowPull&) { return PulledRows{{}, AsBytes(rows), nullptr}; };
  auto session = client_->OpenPrompt(PullOpen(), options);
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE((*session)->SendLayer(0, Tensors(queries_, keys_, "")).ok());
  const absl::Status status = (*session)->Wait().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("gave 47 bytes of TENSOR_VALUES of layer 0"));
}

TEST_F(PullTest, RefusesTensorsThatRowsCannotBeTakenFrom) {
  auto session = client_->OpenPrompt(PullOpen());
  ASSERT_TRUE(session.ok());
  const absl::Status status =
      (*session)->SendLayer(0, Tensors(queries_, keys_, Values(0).substr(1)));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("TENSOR_VALUES has 95 bytes"));
}

TEST_F(PullTest, NeedsARowSourceForPiecesOfTheCallersOwn) {
  auto session = client_->OpenPrompt(PullOpen());
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE((*session)->Send(0, v1::TENSOR_WINDOW_QUERIES, AsBytes(queries_)).ok());
  ASSERT_TRUE((*session)->Send(0, v1::TENSOR_KEYS, AsBytes(keys_)).ok());
  EXPECT_EQ((*session)->Wait().status().code(), absl::StatusCode::kFailedPrecondition);
}

// A commit of less than was due is the server's to refuse: no rows are waited for that nobody will
// ask for.
TEST_F(PullTest, DoesNotWaitForRowsOfALayerThatWasNotSent) {
  auto session = client_->OpenPrompt(PullOpen());
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE((*session)->Send(0, v1::TENSOR_WINDOW_QUERIES, AsBytes(queries_)).ok());
  ASSERT_TRUE((*session)->Commit().ok());
  EXPECT_EQ((*session)->Wait().status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(PullTest, CancelEndsAWait) {
  FakeServer silent([](int, grpc::ServerContext*, Stream* stream) {
    Received received;
    ReadOpen(stream, &received);
    SendOpened(stream, OpenedForPull(received.open));
    ReadToCommit(stream, &received);
    return grpc::Status::OK;
  });
  auto client = *Client::Connect(silent.address());
  auto session = client->OpenPrompt(PullOpen());
  ASSERT_TRUE(session.ok());
  std::thread canceller([&] {
    absl::SleepFor(absl::Milliseconds(50));
    (*session)->Cancel();
  });
  const std::string values = Values(0);
  EXPECT_EQ((*session)->SendLayer(0, Tensors(queries_, keys_, values)).code(),
            absl::StatusCode::kCancelled);
  canceller.join();
}

TEST_F(PullTest, IsTriedAgainBeforeTheFirstResult) {
  FakeServer server([this](int attempt, grpc::ServerContext* context, Stream* stream) {
    if (attempt > 1) return pulling_(attempt, context, stream);
    Received received;
    ReadOpen(stream, &received);
    SendOpened(stream, OpenedForPull(received.open));
    std::string keys;
    ReadTensor(stream, 0, v1::TENSOR_KEYS, kWhole, &keys);
    stream->Write(PullOf(0));
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "draining");
  });
  auto client = *Client::Connect(server.address());
  SessionOptions options;
  options.retry.initial_backoff = absl::Milliseconds(1);
  std::string values;
  const auto source = [&](uint32_t layer) -> absl::StatusOr<LayerTensors> {
    values = Values(layer);
    return Tensors(queries_, keys_, values);
  };
  const auto result = CompressPrompt(*client, PullOpen(), source, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(server.attempts(), 2);
  EXPECT_THAT(pulling_.values, ElementsAre(ValuesOfPull(0), ValuesOfPull(1)));
}

// ---- What the server says against the protocol ----

struct Lie {
  const char* name;
  std::function<void(v1::CompressResponse*)> tell;
  const char* text;
};
void PrintTo(const Lie& lie, std::ostream* out) { *out << lie.name; }

class LyingPullTest : public ::testing::TestWithParam<Lie> {};

TEST_P(LyingPullTest, IsDataLoss) {
  FakeServer server([](int, grpc::ServerContext*, Stream* stream) {
    Received received;
    ReadOpen(stream, &received);
    SendOpened(stream, OpenedForPull(received.open));
    v1::CompressResponse pull = PullOf(0);
    GetParam().tell(&pull);
    stream->Write(pull);
    stream->Write(PullOf(0));
    v1::CompressResponse layer = LayerResponse(received.open, 0);
    (*layer.mutable_layer()->mutable_pieces(0)->mutable_data())[4] = 3;
    stream->Write(layer);
    ReadToCommit(stream, &received);
    return grpc::Status::OK;
  });
  auto client = *Client::Connect(server.address());
  const std::string rows(kPulled, 'r');
  SessionOptions options;
  options.rows = [&](const RowPull&) { return PulledRows{{}, AsBytes(rows), nullptr}; };
  auto session = client->OpenPrompt(PullOpen(), options);
  ASSERT_TRUE(session.ok());
  const absl::Status status = (*session)->Collect().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().text));
}

v1::TensorPiece* Positions(v1::CompressResponse* response) {
  return response->mutable_pull()->mutable_pieces(0);
}

INSTANTIATE_TEST_SUITE_P(
    , LyingPullTest,
    ::testing::Values(
        Lie{"Twice", [](v1::CompressResponse*) {}, "rows of layer 0 were asked for twice"},
        Lie{"NoSuchLayer", [](v1::CompressResponse* r) { r->mutable_pull()->set_layer(2); },
            "RowPull.layer is 2 of 2"},
        Lie{"OtherCount", [](v1::CompressResponse* r) { r->mutable_pull()->set_kept_tokens(4); },
            "is of 4 rows, Opened said 3"},
        Lie{"OtherTensor",
            [](v1::CompressResponse* r) { r->mutable_pull()->set_tensors(0, v1::TENSOR_KEYS); },
            "asks for tensor 1"},
        Lie{"NoTensor", [](v1::CompressResponse* r) { r->mutable_pull()->clear_tensors(); },
            "asks for 0 tensors"},
        Lie{"PastTheEnd", [](v1::CompressResponse* r) { (*Positions(r)->mutable_data())[8] = 6; },
            "layer 0 keeps position 6 of 6 tokens"},
        Lie{"Negative",
            [](v1::CompressResponse* r) { (*Positions(r)->mutable_data())[11] = '\x80'; },
            "of 6 tokens"},
        Lie{"Short", [](v1::CompressResponse* r) { Positions(r)->mutable_data()->resize(8); },
            "ended with 8 of 12 bytes of positions"},
        Lie{"Long", [](v1::CompressResponse* r) { Positions(r)->mutable_data()->resize(16); },
            "pulled positions: a piece at 0 of 16 bytes"},
        Lie{"AnotherTensorsPiece",
            [](v1::CompressResponse* r) { Positions(r)->set_tensor(v1::TENSOR_KEYS); },
            "holds tensor 1 of layer 0"},
        Lie{"Interrupted",
            [](v1::CompressResponse* r) {
              *r = PullOf(1);
              r->mutable_pull()->set_complete(false);
            },
            "the pull of layer 1 was interrupted"},
        Lie{"LayerFirst", [](v1::CompressResponse* r) { *r = LayerResponse(PullOpen(), 0); },
            "layer 0 was answered before its rows were asked for"},
        Lie{"OtherPositions", [](v1::CompressResponse* r) { *r = PullOf(1); },
            "layer 0 keeps other positions than those that were pulled"}),
    [](const auto& instance) { return instance.param.name; });

TEST(UnknownPullTest, IsUnimplementedWhereTheServerWantsAllValues) {
  FakeServer server([](int, grpc::ServerContext*, Stream* stream) {
    Received received;
    ReadOpen(stream, &received);
    SendOpened(stream, OpenedFor(received.open));
    ReadToCommit(stream, &received);
    return grpc::Status::OK;
  });
  auto client = *Client::Connect(server.address());
  EXPECT_EQ(client->OpenPrompt(PullOpen()).status().code(), absl::StatusCode::kUnimplemented);
}

TEST(UnknownPullTest, APullThatNobodyWantsIsDataLoss) {
  FakeServer server([](int, grpc::ServerContext*, Stream* stream) {
    Received received;
    ReadOpen(stream, &received);
    SendOpened(stream, OpenedFor(received.open));
    stream->Write(PullOf(0));
    ReadToCommit(stream, &received);
    return grpc::Status::OK;
  });
  auto client = *Client::Connect(server.address());
  auto session = client->OpenPrompt(SmallOpen());
  ASSERT_TRUE(session.ok());
  EXPECT_EQ((*session)->Collect().status().code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace structkv::client
