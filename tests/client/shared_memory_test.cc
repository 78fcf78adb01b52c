// Sessions over shared memory, against a server of the test's own that has the region mapped.
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/arena.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "structkv/sizes.h"
#include "tests/client/fake_region_socket.h"
#include "tests/client/fake_server.h"

namespace structkv::client {
namespace {

using ::testing::HasSubstr;

constexpr size_t kRoom = 64;  // of a result's tensor of 3 rows of 4 floats, rounded up

class SharedMemoryTest : public ::testing::Test {
 protected:
  SharedMemoryTest()
      : server_([this](int attempt, grpc::ServerContext*, Stream* stream) {
          return Serve(attempt, stream);
        }),
        client_(ClientOf(server_)) {
    server_.region_socket = socket_.path();
    inputs_ = NewArena(1 << 16);
    results_ = NewArena(1 << 16);
    options_.regions = {inputs_->region()};
  }

  static std::shared_ptr<Arena> NewArena(size_t bytes) {
    RegionOptions options;
    options.size_bytes = bytes;
    return std::make_shared<Arena>(*Region::Create(options));
  }

  // Grants `grant`, answers a layer once its values came.
  grpc::Status Serve(int attempt, Stream* stream) {
    Received received;
    if (!ReadOpen(stream, &received)) return {grpc::StatusCode::INVALID_ARGUMENT, "no open"};
    open_ = received.open;
    if (attempt <= unknown_until_ && open_.regions_size() > 0) {
      return {grpc::StatusCode::NOT_FOUND, "no such region"};
    }
    v1::Opened opened = OpenedFor(open_);
    const bool asked = open_.transports_size() > 0;
    opened.set_transport(asked || always_grant_ ? grant_ : v1::TRANSPORT_INLINE);
    if (grant_ == v1::TRANSPORT_INLINE && asked) opened.set_transport_reason("no mood for it");
    SendOpened(stream, opened);
    v1::CompressRequest request;
    while (!received.committed && stream->Read(&request)) {
      Take(request, &received);
      for (const v1::TensorPiece& piece : request.pieces().pieces()) {
        pieces_.push_back(piece);
        if (piece.tensor() == v1::TENSOR_VALUES) AnswerLayer(stream, piece.layer());
      }
    }
    if (!received.committed) return {grpc::StatusCode::INVALID_ARGUMENT, "no commit"};
    SendSummary(stream, SummaryFor(open_, OpenedFor(open_), received.commit.input_bytes()));
    return grpc::Status::OK;
  }

  void AnswerLayer(Stream* stream, uint32_t layer) {
    v1::CompressResponse response = LayerResponse(open_, layer);
    for (v1::TensorPiece& piece : *response.mutable_layer()->mutable_pieces()) {
      if (piece.tensor() == v1::TENSOR_POSITIONS || !open_.has_result_range() ||
          grant_ == v1::TRANSPORT_INLINE) {
        continue;
      }
      const std::string data = piece.data();
      v1::RegionRange* range = piece.mutable_range();
      *range = open_.result_range();
      range->set_offset_bytes(range->offset_bytes() + layer * 2 * kRoom +
                              (piece.tensor() == v1::TENSOR_VALUES ? kRoom : 0) + shift_);
      range->set_size_bytes(data.size());
      std::memcpy(Memory(*range), data.data(), data.size());
    }
    stream->Write(response);
  }

  // Where the server has a range mapped.
  std::byte* Memory(const v1::RegionRange& range) {
    const std::string& handle = open_.regions(static_cast<int>(range.region()));
    return socket_.regions()[handle[0] - 'a'].memory.get() + range.offset_bytes();
  }

  std::string Content(const v1::TensorPiece& piece) {
    if (!piece.has_range()) return piece.data();
    return {reinterpret_cast<const char*>(Memory(piece.range())), piece.range().size_bytes()};
  }

  // A block of the inputs' arena with a tensor of SmallOpen().
  Bytes Put(uint32_t layer, v1::Tensor tensor, Arena* arena) {
    const size_t size = tensor == v1::TENSOR_WINDOW_QUERIES ? 64 : 96;
    Bytes block = *arena->Allocate(size);
    std::memcpy(block.data(), TestTensor(layer, tensor, size).data(), size);
    return block;
  }

  absl::StatusOr<LayerTensors> Layer(uint32_t layer, Arena* arena) {
    auto blocks = std::make_shared<std::vector<Bytes>>();
    LayerTensors tensors;
    for (const auto& [tensor, span] :
         {std::pair(v1::TENSOR_KEYS, &tensors.keys), std::pair(v1::TENSOR_VALUES, &tensors.values),
          std::pair(v1::TENSOR_WINDOW_QUERIES, &tensors.window_queries)}) {
      blocks->push_back(Put(layer, tensor, arena));
      *span = blocks->back().span();
    }
    tensors.owner = blocks;
    return tensors;
  }

  absl::StatusOr<Compressed> Compress(Arena* arena) {
    return CompressPrompt(
        *client_, SmallOpen(), [&](uint32_t layer) { return Layer(layer, arena); }, options_);
  }

  void ExpectResults(const Compressed& compressed) {
    ASSERT_EQ(compressed.layers.size(), 2);
    for (const LayerResult& layer : compressed.layers) {
      for (const auto& [tensor, bytes] :
           {std::pair(v1::TENSOR_KEYS, layer.keys), std::pair(v1::TENSOR_VALUES, layer.values)}) {
        const std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
        EXPECT_EQ(text, TestTensor(layer.layer + 100, tensor, 48));
      }
    }
    for (const v1::TensorPiece& piece : pieces_) {
      EXPECT_EQ(piece.offset_bytes(), 0);
    }
  }

  FakeRegionSocket socket_;
  v1::Transport grant_ = v1::TRANSPORT_SHARED_MEMORY;
  bool always_grant_ = false;
  int unknown_until_ = 0;  // attempts whose regions are not known
  int64_t shift_ = 0;      // of results from where they belong
  v1::Open open_;
  std::vector<v1::TensorPiece> pieces_;
  FakeServer server_;
  std::unique_ptr<Client> client_;
  std::shared_ptr<Arena> inputs_;
  std::shared_ptr<Arena> results_;
  SessionOptions options_;
};

TEST_F(SharedMemoryTest, RangesAreNamedInPlaceOfData) {
  const auto compressed = Compress(inputs_.get());
  ASSERT_TRUE(compressed.ok()) << compressed.status();
  ExpectResults(*compressed);
  EXPECT_EQ(compressed->opened.transport(), v1::TRANSPORT_SHARED_MEMORY);
  EXPECT_EQ(open_.transports_size(), 2);
  EXPECT_FALSE(open_.has_result_range());
  ASSERT_EQ(pieces_.size(), 6);
  for (const v1::TensorPiece& piece : pieces_) EXPECT_TRUE(piece.has_range());
  EXPECT_EQ(compressed->summary.input_bytes(), 2 * (96 + 96 + 64));
  EXPECT_EQ(inputs_->free_bytes(), 1 << 16) << "inputs are the caller's again";
}

TEST_F(SharedMemoryTest, TheServerReadsWhatTheClientWrote) {
  auto session = client_->OpenPrompt(SmallOpen(), options_);
  ASSERT_TRUE(session.ok()) << session.status();
  const LayerTensors tensors = *Layer(0, inputs_.get());
  ASSERT_TRUE((*session)->SendLayer(0, tensors).ok());
  ASSERT_TRUE((*session)->NextEvent().ok());
  for (const v1::TensorPiece& piece : pieces_) {
    EXPECT_EQ(Content(piece), TestTensor(0, piece.tensor(), piece.range().size_bytes()));
  }
}

TEST_F(SharedMemoryTest, ResultsAreViewsOfTheArena) {
  options_.results = results_;
  absl::StatusOr<Compressed> compressed = Compress(inputs_.get());
  ASSERT_TRUE(compressed.ok()) << compressed.status();
  ExpectResults(*compressed);
  for (const LayerResult& layer : compressed->layers) {
    EXPECT_TRUE(results_->region()->OffsetOf(layer.keys.span()).has_value());
    EXPECT_TRUE(results_->region()->OffsetOf(layer.values.span()).has_value());
  }
  const Bytes last = compressed->layers.back().values;
  compressed = absl::UnknownError("dropped");
  EXPECT_LT(results_->free_bytes(), 1 << 16);
  EXPECT_EQ(last.size(), 48);
}

TEST_F(SharedMemoryTest, ALayersMemoryIsReleasedBeforeItsResultIsHandedOn) {
  std::vector<std::weak_ptr<const void>> owners;
  std::vector<bool> released;
  options_.on_event = [&](const Event& event) {
    const auto* layer = std::get_if<LayerResult>(&event);
    if (layer != nullptr) released.push_back(owners[layer->layer].expired());
  };
  auto session = client_->OpenPrompt(SmallOpen(), options_);
  ASSERT_TRUE(session.ok()) << session.status();
  for (uint32_t layer = 0; layer < 2; ++layer) {
    LayerTensors tensors = *Layer(layer, inputs_.get());
    owners.push_back(tensors.owner);
    // Two messages, so that this thread holds nothing any more when the answer comes.
    const LayerTensors queries = {.window_queries = tensors.window_queries, .owner = tensors.owner};
    ASSERT_TRUE((*session)->SendLayer(layer, queries).ok());
    tensors.window_queries = {};
    const auto owner = std::move(tensors.owner);
    tensors.owner = nullptr;
    EXPECT_FALSE(owners[layer].expired());
    ASSERT_TRUE((*session)->SendLayer(layer, tensors).ok());
  }
  ASSERT_TRUE((*session)->Commit().ok());
  ASSERT_TRUE((*session)->Wait().ok());
  EXPECT_EQ(released.size(), 2);
  EXPECT_EQ(inputs_->free_bytes(), 1 << 16);
}

TEST_F(SharedMemoryTest, WhatLiesOutsideOfRegionsIsRefusedByName) {
  options_.transport = TransportChoice::kSharedMemory;
  const auto elsewhere = NewArena(4096);
  const auto refused = Compress(elsewhere.get());
  EXPECT_EQ(refused.status(),
            absl::InvalidArgumentError(
                "layer 0: TENSOR_KEYS lies outside of StreamOptions.regions; there is no "
                "StreamOptions.staging to copy it to"));
  const auto shifted = CompressPrompt(
      *client_, SmallOpen(),
      [&](uint32_t layer) -> absl::StatusOr<LayerTensors> {
        LayerTensors tensors = *Layer(layer, inputs_.get());
        tensors.values = {tensors.values.data() + 4, 96};
        return tensors;
      },
      options_);
  EXPECT_EQ(shifted.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(shifted.status().message()),
              HasSubstr("layer 0: TENSOR_VALUES does not begin at a multiple of 64 bytes"));
}

// The staging arena has room for the keys and values of one layer alone.
TEST_F(SharedMemoryTest, WhatLiesOutsideIsCopiedToStagingAsAnswersMakeRoom) {
  options_.regions.clear();
  options_.staging = NewArena(4096);
  const Bytes rest = *options_.staging->Allocate(4096 - 256);
  const auto elsewhere = NewArena(4096);
  const auto compressed = Compress(elsewhere.get());
  ASSERT_TRUE(compressed.ok()) << compressed.status();
  ExpectResults(*compressed);
  for (const v1::TensorPiece& piece : pieces_) {
    EXPECT_EQ(piece.has_range(), piece.tensor() != v1::TENSOR_WINDOW_QUERIES);
  }
  EXPECT_EQ(options_.staging->free_bytes(), 256);
}

TEST_F(SharedMemoryTest, StagingThatIsTooSmallIsAnError) {
  options_.staging = NewArena(4096);
  const Bytes rest = *options_.staging->Allocate(4096 - 128);
  const auto elsewhere = NewArena(4096);
  const auto compressed = Compress(elsewhere.get());
  EXPECT_EQ(compressed.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(compressed.status().message()),
              HasSubstr("layer 0: TENSOR_VALUES lies outside of StreamOptions.regions; the arena "
                        "has no block of 128 bytes"));
}

TEST_F(SharedMemoryTest, WithoutRoomForResultsThePromptIsNotOpened) {
  options_.results = NewArena(4096);
  const Bytes rest = *options_.results->Allocate(4096);
  const auto compressed = Compress(inputs_.get());
  EXPECT_EQ(compressed.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(compressed.status().message()), HasSubstr("PromptOptions.results: "));
  EXPECT_EQ(server_.attempts(), 0);
}

TEST_F(SharedMemoryTest, AutoTakesWhatTheServerGrants) {
  grant_ = v1::TRANSPORT_INLINE;
  options_.results = results_;
  const auto compressed = Compress(inputs_.get());
  ASSERT_TRUE(compressed.ok()) << compressed.status();
  EXPECT_EQ(compressed->opened.transport(), v1::TRANSPORT_INLINE);
  EXPECT_EQ(compressed->opened.transport_reason(), "no mood for it");
  for (const v1::TensorPiece& piece : pieces_) EXPECT_FALSE(piece.has_range());
}

TEST_F(SharedMemoryTest, AutoSaysWhyItIsInline) {
  const auto reason = [&] {
    const auto compressed = Compress(inputs_.get());
    EXPECT_TRUE(compressed.ok()) << compressed.status();
    EXPECT_EQ(compressed->opened.transport(), v1::TRANSPORT_INLINE);
    EXPECT_EQ(open_.transports_size(), 0);
    return compressed->opened.transport_reason();
  };
  socket_.Refuse(static_cast<uint32_t>(grpc::StatusCode::RESOURCE_EXHAUSTED), "1 GiB is taken");
  EXPECT_EQ(reason(), "1 GiB is taken");
  server_.region_socket = "/nowhere/regions";
  EXPECT_THAT(reason(), HasSubstr("region socket /nowhere/regions: connecting: No such file"));
  server_.region_socket = "";
  EXPECT_THAT(reason(), HasSubstr("the server has no shared memory"));
  options_.regions.clear();
  EXPECT_EQ(reason(), "no region was given (StreamOptions.regions)");
}

TEST_F(SharedMemoryTest, ThatIsAskedForIsAnErrorWhereItCannotBe) {
  options_.transport = TransportChoice::kSharedMemory;
  options_.retry.max_attempts = 1;
  server_.region_socket = "/nowhere/regions";
  EXPECT_EQ(Compress(inputs_.get()).status().code(), absl::StatusCode::kUnavailable);
  server_.region_socket = "";
  EXPECT_EQ(Compress(inputs_.get()).status().code(), absl::StatusCode::kUnimplemented);
  options_.regions.clear();
  EXPECT_EQ(Compress(inputs_.get()).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(server_.attempts(), 0);
}

TEST_F(SharedMemoryTest, InlineAsksForNothing) {
  options_.transport = TransportChoice::kInline;
  const auto compressed = Compress(inputs_.get());
  ASSERT_TRUE(compressed.ok()) << compressed.status();
  EXPECT_EQ(open_.transports_size() + open_.regions_size(), 0);
  EXPECT_TRUE(socket_.regions().empty());
  EXPECT_EQ(compressed->opened.transport(), v1::TRANSPORT_INLINE);
}

TEST_F(SharedMemoryTest, RegionsThatTheServerHasLostAreRegisteredAgain) {
  unknown_until_ = 1;
  const auto compressed = Compress(inputs_.get());
  ASSERT_TRUE(compressed.ok()) << compressed.status();
  EXPECT_EQ(compressed->opened.transport(), v1::TRANSPORT_SHARED_MEMORY);
  EXPECT_EQ(socket_.regions().size(), 2);
}

TEST_F(SharedMemoryTest, RegionsThatTheServerNeverKnows) {
  unknown_until_ = 9;
  const auto compressed = Compress(inputs_.get());
  ASSERT_TRUE(compressed.ok()) << compressed.status();
  EXPECT_EQ(compressed->opened.transport_reason(),
            "the server does not know the registered regions");
  EXPECT_EQ(server_.attempts(), 3);
  options_.transport = TransportChoice::kSharedMemory;
  EXPECT_EQ(Compress(inputs_.get()).status(), absl::NotFoundError("no such region"));
  EXPECT_EQ(server_.attempts(), 5);
}

TEST_F(SharedMemoryTest, AServerThatBreaksTheProtocol) {
  options_.results = results_;
  shift_ = 64;
  const auto shifted = Compress(inputs_.get());
  EXPECT_EQ(shifted.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(shifted.status().message()),
              HasSubstr("keys lie in 48 bytes at 64 of region 1; 48 bytes at 0 of region 1 are"));
  options_.transport = TransportChoice::kInline;
  always_grant_ = true;
  const auto unasked = Compress(inputs_.get());
  EXPECT_EQ(unasked.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(unasked.status().message()), HasSubstr("which Open did not name"));
}

TEST_F(SharedMemoryTest, ChunksAreWrittenIntoTheirTensorInstead) {
  auto session = client_->OpenPrompt(SmallOpen(), options_);
  ASSERT_TRUE(session.ok()) << session.status();
  EXPECT_THAT(std::string((*session)->SendChunk(0, 0, 1, {}).message()),
              HasSubstr("write chunks into their tensor"));
}

}  // namespace
}  // namespace structkv::client
