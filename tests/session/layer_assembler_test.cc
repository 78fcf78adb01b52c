#include "service/session/layer_assembler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "proto/structkv/v1/piece_codec.h"
#include "tests/session/session_probe.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/prompt_cases.h"

namespace structkv::session {
namespace {

using engine::InputTensor;
using Taken = LayerAssembler::Taken;
using ::testing::AllOf;
using ::testing::HasSubstr;

// 4 layers of 2 KV heads, 200 tokens and 32 elements in bf16: keys and values of 25,600 bytes.
class LayerAssemblerTest : public ::testing::Test {
 protected:
  void Use(const std::string& name, int64_t layers_in_flight) {
    data_ = std::make_unique<testkit::PromptData>(testkit::FindCase(name).open, 3);
    spec_ = testkit::SpecOf(data_->open());
    assembler_ = std::make_unique<LayerAssembler>(&spec_, &pool_, layers_in_flight);
  }
  void SetUp() override { Use("StructKv", 2); }

  absl::StatusOr<Taken> Take(const PieceBytes& piece, size_t runs = 1) {
    const InputMessage message = MessageOf({piece}, runs);
    return assembler_->Take(message.pieces[0], stop_);
  }
  PieceBytes Piece(int64_t layer, InputTensor tensor) const {
    return PieceOf(*data_, layer, tensor, 0, spec_.InputBytes(tensor));
  }
  static void SetChecksum(PieceBytes& piece) {
    piece.xxh3_64 = wire::Checksum({absl::MakeConstSpan(
        reinterpret_cast<const std::byte*>(piece.bytes.data()), piece.bytes.size())});
  }
  void TakeLayer(int64_t layer) {
    for (const PieceBytes& piece : LayerPieces(*data_, spec_, layer)) {
      const absl::StatusOr<Taken> taken = Take(piece, 3);
      ASSERT_TRUE(taken.ok()) << taken.status();
      ASSERT_EQ(*taken, Taken::kYes);
    }
  }
  void ExpectRefused(const PieceBytes& piece, absl::StatusCode code,
                     const std::vector<std::string>& parts) {
    const absl::Status status = Take(piece).status();
    EXPECT_EQ(status.code(), code) << status;
    for (const std::string& part : parts) {
      EXPECT_THAT(std::string(status.message()), HasSubstr(part));
    }
  }
  void ExpectLayer(const std::optional<engine::LayerInput>& input, int64_t layer) {
    ASSERT_TRUE(input.has_value());
    EXPECT_EQ(input->layer, layer);
    const auto check = [&](InputTensor tensor, const engine::Buffer& buffer) {
      const std::string got(reinterpret_cast<const char*>(buffer.data()), buffer.size());
      EXPECT_TRUE(got == data_->tensor(static_cast<uint32_t>(layer), ProtoTensor(tensor)));
    };
    check(InputTensor::kKeys, input->keys);
    check(InputTensor::kValues, input->values);
    check(InputTensor::kWindowQueries, input->window_queries);
    check(InputTensor::kWindowLse, input->window_lse);
    check(InputTensor::kSaliency, input->saliency);
  }

  engine::BufferPool pool_{0};
  std::unique_ptr<testkit::PromptData> data_;
  engine::PromptSpec spec_;
  std::unique_ptr<LayerAssembler> assembler_;
  std::atomic<bool> stop_{false};
};

TEST_F(LayerAssemblerTest, PutsAnyPiecesTogether) {
  Use("StructKvLse", 1);
  for (const PieceBytes& whole : LayerPieces(*data_, spec_, 0)) {
    EXPECT_FALSE(assembler_->has_complete());
    const auto size = static_cast<int64_t>(whole.bytes.size());
    // The last third, the first, the middle, by odd numbers of bytes.
    const int64_t a = size / 3 | 1;
    const int64_t b = 2 * (size / 3) | 1;
    for (const auto& [begin, end] : {std::pair{b, size}, {int64_t{0}, a}, {a, b}}) {
      EXPECT_EQ(*Take(PieceOf(*data_, 0, whole.tensor, begin, end - begin), 4), Taken::kYes);
    }
  }
  ASSERT_TRUE(assembler_->has_complete());
  ExpectLayer(assembler_->PopComplete(), 0);
  EXPECT_FALSE(assembler_->has_complete());
  EXPECT_FALSE(assembler_->PopComplete().has_value());
  EXPECT_EQ(assembler_->received_layers(), 1);
  EXPECT_EQ(assembler_->received_bytes(), static_cast<int64_t>(data_->total_bytes()) / 4);
}

TEST_F(LayerAssemblerTest, GivesLayersInOrderOfCompletion) {
  Use("StructKvSaliency", 3);
  EXPECT_EQ(*Take(Piece(0, InputTensor::kKeys)), Taken::kYes);
  TakeLayer(2);
  TakeLayer(1);
  EXPECT_EQ(*Take(Piece(0, InputTensor::kValues)), Taken::kYes);
  EXPECT_EQ(*Take(Piece(0, InputTensor::kSaliency)), Taken::kYes);
  for (const int64_t layer : {2, 1, 0}) ExpectLayer(assembler_->PopComplete(), layer);
}

TEST_F(LayerAssemblerTest, HoldsBuffersOfTheLayersInFlightAlone) {
  EXPECT_EQ(pool_.in_use_bytes(), 0U);
  TakeLayer(0);
  TakeLayer(1);
  const size_t two_layers = pool_.in_use_bytes();
  EXPECT_GE(two_layers, data_->total_bytes() / 2);
  // Two layers wait: a third one finds no buffer, as often as it comes.
  const PieceBytes piece = Piece(2, InputTensor::kKeys);
  EXPECT_EQ(*Take(piece), Taken::kNoBuffer);
  EXPECT_EQ(*Take(piece), Taken::kNoBuffer);
  // The layer that is computed holds its buffers until it is done.
  std::optional<engine::LayerInput> computed = assembler_->PopComplete();
  EXPECT_EQ(*Take(piece), Taken::kNoBuffer);
  computed.reset();
  assembler_->LayerDone();
  EXPECT_EQ(*Take(piece), Taken::kYes);
  EXPECT_EQ(pool_.in_use_bytes(), two_layers);
  ExpectLayer(assembler_->PopComplete(), 1);
  EXPECT_EQ(*Take(Piece(3, InputTensor::kKeys)), Taken::kNoBuffer);
  EXPECT_EQ(pool_.peak_in_use_bytes(), two_layers);
}

TEST_F(LayerAssemblerTest, RefusesLayersAheadOfTheWindow) {
  ExpectRefused(Piece(2, InputTensor::kKeys), absl::StatusCode::kInvalidArgument,
                {"layer 2, keys", "layer 0 is unfinished", "layers_in_flight is 2", "below 2"});
}

TEST_F(LayerAssemblerTest, TheWindowMovesWithTheLowestUnfinishedLayer) {
  TakeLayer(1);
  assembler_->PopComplete();
  assembler_->LayerDone();
  ExpectRefused(Piece(2, InputTensor::kKeys), absl::StatusCode::kInvalidArgument,
                {"layer 0 is unfinished"});
  SetUp();
  TakeLayer(1);
  TakeLayer(0);
  for (int i = 0; i < 2; ++i) {
    assembler_->PopComplete();
    assembler_->LayerDone();
  }
  EXPECT_EQ(*Take(Piece(3, InputTensor::kKeys)), Taken::kYes);
}

TEST_F(LayerAssemblerTest, RefusesWhatThePromptDoesNotHave) {
  for (const int64_t layer : {int64_t{-1}, int64_t{4}, int64_t{0xffffffff}}) {
    PieceBytes piece = Piece(0, InputTensor::kKeys);
    piece.layer = layer;
    ExpectRefused(piece, absl::StatusCode::kOutOfRange, {std::to_string(layer), "0 to 3"});
  }
  for (const InputTensor tensor : {InputTensor::kWindowLse, InputTensor::kSaliency}) {
    PieceBytes piece = Piece(0, InputTensor::kKeys);
    piece.tensor = tensor;
    ExpectRefused(piece, absl::StatusCode::kInvalidArgument, {"layer 0, ", "no such tensor"});
  }
  PieceBytes piece = Piece(1, InputTensor::kValues);
  piece.offset = 1;
  ExpectRefused(piece, absl::StatusCode::kInvalidArgument,
                {"layer 1, values", "offset_bytes 1", "25600 bytes"});
}

TEST_F(LayerAssemblerTest, APieceAgainIsIgnoredOrRefused) {
  const PieceBytes piece = PieceOf(*data_, 0, InputTensor::kKeys, 100, 50);
  ASSERT_TRUE(Take(piece).ok());
  EXPECT_EQ(*Take(piece, 3), Taken::kYes);
  EXPECT_EQ(assembler_->received_bytes(), 50);
  PieceBytes other = piece;
  other.bytes[49] ^= 1;
  ExpectRefused(other, absl::StatusCode::kAlreadyExists,
                {"layer 0, keys", "50 bytes", "offset_bytes 100", "other bytes"});
}

// Also when the layer was answered, and when no layer has room.
TEST_F(LayerAssemblerTest, PiecesOfLayersThatAreDoneAreRemembered) {
  PieceBytes values = Piece(0, InputTensor::kValues);
  SetChecksum(values);
  ASSERT_TRUE(Take(values).ok());
  TakeLayer(0);
  assembler_->PopComplete();
  assembler_->LayerDone();
  TakeLayer(1);
  TakeLayer(2);
  const int64_t received = assembler_->received_bytes();
  EXPECT_EQ(*Take(values), Taken::kYes);
  values.xxh3_64.reset();
  EXPECT_EQ(*Take(values, 7), Taken::kYes);
  EXPECT_EQ(assembler_->received_bytes(), received);
  values.bytes[300] ^= 1;  // values came with a checksum: any byte tells
  ExpectRefused(values, absl::StatusCode::kAlreadyExists, {"layer 0, values"});
}

// Of a piece that came without a checksum the first 256 bytes of each 8 KiB are told.
TEST_F(LayerAssemblerTest, ASampleTellsPiecesOfLayersThatAreDone) {
  TakeLayer(0);
  assembler_->PopComplete();
  assembler_->LayerDone();
  const PieceBytes keys = Piece(0, InputTensor::kKeys);
  for (const size_t runs : {1, 5, 40}) EXPECT_EQ(*Take(keys, runs), Taken::kYes);
  PieceBytes with_checksum = keys;
  SetChecksum(with_checksum);
  EXPECT_EQ(*Take(with_checksum), Taken::kYes);
  for (const size_t unseen : {256, 8191, 16383}) {
    PieceBytes other = keys;
    other.bytes[unseen] ^= 1;
    EXPECT_EQ(*Take(other, 3), Taken::kYes) << unseen;
  }
  PieceBytes other = keys;
  other.bytes[16384 + 255] ^= 1;
  ExpectRefused(other, absl::StatusCode::kAlreadyExists, {"layer 0, keys"});
}

TEST_F(LayerAssemblerTest, ChecksumsAreChecked) {
  PieceBytes piece = PieceOf(*data_, 0, InputTensor::kKeys, 0, 3);
  piece.bytes = "abc";
  piece.xxh3_64 = 0x78af5f94892f3950;  // XXH3 of "abc"
  EXPECT_EQ(*Take(piece, 2), Taken::kYes);
  piece.xxh3_64 = 0x78af5f94892f3951;
  ExpectRefused(
      piece, absl::StatusCode::kDataLoss,
      {"layer 0, keys", "3 bytes", "offset_bytes 0", "0x78af5f94892f3950", "0x78af5f94892f3951"});
}

TEST_F(LayerAssemblerTest, StopsInTheMiddle) {
  stop_ = true;
  EXPECT_EQ(*Take(Piece(0, InputTensor::kKeys)), Taken::kStopped);
  EXPECT_EQ(assembler_->received_bytes(), 0);
}

TEST_F(LayerAssemblerTest, WhereNothingIsDueEveryLayerIsComplete) {
  Use("StreamingLlmPlan", 1);
  for (int64_t layer = 0; layer < 4; ++layer) ExpectLayer(assembler_->PopComplete(), layer);
  EXPECT_FALSE(assembler_->has_complete());
  EXPECT_TRUE(assembler_->CheckCommit(4, 0).ok());
}

TEST_F(LayerAssemblerTest, TellsWhoseTurnItIs) {
  EXPECT_EQ(assembler_->turn(), Turn::kNobodys);
  for (int64_t layer = 0; layer < 2; ++layer) {
    ASSERT_TRUE(Take(Piece(layer, InputTensor::kKeys)).ok());
    EXPECT_EQ(assembler_->turn(), Turn::kCallers);
    TakeLayer(layer);
    EXPECT_EQ(assembler_->turn(), Turn::kServers);
  }
  for (int64_t layer = 0; layer < 2; ++layer) {
    ExpectLayer(assembler_->PopComplete(), layer);
    EXPECT_EQ(assembler_->turn(), Turn::kServers);
    assembler_->LayerDone();
  }
  EXPECT_EQ(assembler_->turn(), Turn::kNobodys);
}

TEST_F(LayerAssemblerTest, PulledRowsAreTheCallersTurn) {
  spec_.pull = engine::Pull::kValues;
  assembler_ = std::make_unique<LayerAssembler>(&spec_, &pool_, 2);
  for (const InputTensor tensor : spec_.RequiredTensors()) {
    ASSERT_TRUE(Take(Piece(0, tensor)).ok());
  }
  ASSERT_TRUE(assembler_->PopComplete().has_value());
  EXPECT_EQ(assembler_->turn(), Turn::kServers);
  assembler_->ExpectRows(0, 1);
  EXPECT_EQ(assembler_->turn(), Turn::kCallers);
}

TEST_F(LayerAssemblerTest, ACommitMustBeWhatCame) {
  Use("StructKv", 4);
  const auto total = static_cast<int64_t>(data_->total_bytes());
  const auto refusal = [&](int64_t layers, int64_t bytes) {
    const absl::Status status = assembler_->CheckCommit(layers, bytes);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  for (const int64_t layer : {0, 1, 3}) TakeLayer(layer);
  ASSERT_TRUE(Take(Piece(2, InputTensor::kKeys)).ok());
  ASSERT_TRUE(Take(PieceOf(*data_, 2, InputTensor::kValues, 5, 20)).ok());
  EXPECT_THAT(refusal(4, total), AllOf(HasSubstr("3 are complete"), HasSubstr("layer 2, values"),
                                       HasSubstr("20 of 25600 bytes")));
  ASSERT_TRUE(Take(PieceOf(*data_, 2, InputTensor::kValues, 0, 5)).ok());
  ASSERT_TRUE(Take(PieceOf(*data_, 2, InputTensor::kValues, 25, 25575)).ok());
  EXPECT_THAT(refusal(4, total), HasSubstr("layer 2, window_queries has 0 of"));
  ASSERT_TRUE(Take(Piece(2, InputTensor::kWindowQueries)).ok());
  EXPECT_THAT(refusal(3, total), AllOf(HasSubstr("layer_count is 3"), HasSubstr("4 layers")));
  EXPECT_THAT(refusal(4, total + 1), AllOf(HasSubstr(std::to_string(total + 1)),
                                           HasSubstr(std::to_string(total) + " bytes came")));
  EXPECT_TRUE(assembler_->CheckCommit(4, total).ok());
}

}  // namespace
}  // namespace structkv::session
