// Messages that protobuf wrote, read by the wire codec, from slices cut anywhere.
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/v1/piece_codec.h"
#include "tests/proto/wire_testing.h"

namespace structkv::wire {
namespace {

using testing::CutEvery;
using testing::CutInto;
using testing::CutRandomly;
using testing::Normalized;
using testkit::Random;

v1::TensorPiece Piece1(uint32_t layer, std::string data) {
  v1::TensorPiece piece;
  piece.set_layer(layer);
  piece.set_tensor(v1::TENSOR_VALUES);
  piece.set_offset_bytes(1000);
  piece.set_data(std::move(data));
  return piece;
}

v1::CompressRequest OnePiece(uint32_t layer, std::string data) {
  v1::CompressRequest request;
  *request.mutable_pieces()->add_pieces() = Piece1(layer, std::move(data));
  return request;
}

// A length-delimited field of a number below 16.
std::string Field(int number, const std::string& value) {
  std::string bytes(1, static_cast<char>(number << 3 | 2));
  bytes.push_back(static_cast<char>(value.size()));  // below 128
  return bytes + value;
}

// One field of every wire type, of numbers that no message has.
const std::string kUnknownFields = std::string("\xf8\x01\x96\x01", 4) +  // 31: varint
                                   std::string(
                                       "\xf9\x01"
                                       "12345678",
                                       10) +  // fixed64
                                   std::string(
                                       "\xfa\x01\x03"
                                       "abc",
                                       6) +  // bytes
                                   std::string(
                                       "\xfd\x01"
                                       "1234",
                                       6);  // fixed32

TEST(DecodeRequestTest, GivesWhatProtobufWrote) {
  Random random(1);
  for (int i = 0; i < 500; ++i) {
    const v1::CompressRequest request = testing::RandomPieces(&random);
    const absl::StatusOr<Request> decoded =
        DecodeRequest(CutRandomly(request.SerializeAsString(), &random));
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    ASSERT_TRUE(std::holds_alternative<Pieces>(*decoded));
    EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(request)) << "message " << i;
    EXPECT_TRUE(testing::RunsLieInSlices(std::get<Pieces>(*decoded)));
  }
}

TEST(DecodeFetchResponseTest, GivesWhatProtobufWrote) {
  Random random(3);
  for (int i = 0; i < 500; ++i) {
    const v1::FetchCacheResponse response = testing::RandomFetchResponse(&random);
    const absl::StatusOr<FetchResponse> decoded =
        DecodeFetchResponse(CutRandomly(response.SerializeAsString(), &random));
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(decoded->message.layer().pieces_size(), 0);
    EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(response)) << "message " << i;
    EXPECT_TRUE(testing::RunsLieInSlices(decoded->pieces));
  }
}

TEST(DecodeResponseTest, GivesWhatProtobufWrote) {
  Random random(2);
  for (int i = 0; i < 500; ++i) {
    const v1::CompressResponse response = testing::RandomResponse(&random);
    const absl::StatusOr<Response> decoded =
        DecodeResponse(CutRandomly(response.SerializeAsString(), &random));
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(decoded->message.layer().pieces_size(), 0);
    EXPECT_EQ(decoded->message.pivot().pieces_size(), 0);
    EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(response)) << "message " << i;
    EXPECT_TRUE(testing::RunsLieInSlices(decoded->pieces));
  }
}

TEST(DecodeRequestTest, DoesNotDependOnWhereSlicesEnd) {
  v1::CompressRequest request = OnePiece(300, "some data of the first");
  request.mutable_pieces()->mutable_pieces(0)->set_xxh3_64(0x0123456789abcdef);
  *request.mutable_pieces()->add_pieces() = Piece1(7, "more");
  *request.mutable_pieces()->add_pieces() = v1::TensorPiece();
  const std::string bytes = request.SerializeAsString();
  for (size_t step = 1; step <= bytes.size(); ++step) {
    const absl::StatusOr<Request> decoded = DecodeRequest(CutEvery(bytes, step));
    ASSERT_TRUE(decoded.ok()) << decoded.status() << " step " << step;
    EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(request)) << "step " << step;
  }
  // One cut at every place, and an empty slice there.
  for (size_t place = 0; place <= bytes.size(); ++place) {
    const absl::StatusOr<Request> decoded = DecodeRequest(CutInto(bytes, {place, 0}));
    ASSERT_TRUE(decoded.ok()) << decoded.status() << " place " << place;
    EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(request)) << "place " << place;
  }
}

// Data, a range and a transfer are a oneof: the later one drops the others, and those of a kind in
// a row are merged.
TEST(DecodeRequestTest, TheLastSourceOfAPieceWins) {
  v1::TensorPiece data;
  data.set_data("some data");
  v1::TensorPiece from;
  from.mutable_range()->set_region(3);
  from.mutable_range()->set_offset_bytes(1 << 20);
  v1::TensorPiece size;
  size.mutable_range()->set_size_bytes(4096);
  v1::TensorPiece key;
  key.mutable_transfer()->set_key("key");
  v1::TensorPiece length;
  length.mutable_transfer()->set_size_bytes(77);
  for (const auto& sources : {std::vector{data, from},
                              {key, length},
                              {length, key},
                              {data, key},
                              {key, data},
                              {from, key},
                              {key, from},
                              {key, from, length},
                              {from, data},
                              {from, size},
                              {from, data, size},
                              {size, from, data}}) {
    std::string piece;
    for (const v1::TensorPiece& source : sources) piece += source.SerializeAsString();
    v1::CompressRequest expected;
    ASSERT_TRUE(expected.mutable_pieces()->add_pieces()->ParseFromString(piece));
    const std::string bytes = Field(v1::CompressRequest::kPiecesFieldNumber,
                                    Field(v1::TensorPieces::kPiecesFieldNumber, piece));
    const absl::StatusOr<Request> decoded = DecodeRequest(CutEvery(bytes, 3));
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(expected))
        << expected.ShortDebugString();
  }
}

TEST(DecodeRequestTest, RunsPointIntoTheReceivedSlices) {
  const std::string data(100'000, 'x');
  const std::string bytes = OnePiece(1, data).SerializeAsString();
  // Apart in memory: gRPC joins neighbours.
  const std::string first = bytes.substr(0, 50'000);
  const std::string second = bytes.substr(50'000);
  const size_t data_at = bytes.find("xxx");
  const grpc::Slice slices[] = {{first.data(), first.size(), grpc::Slice::STATIC_SLICE},
                                {second.data(), second.size(), grpc::Slice::STATIC_SLICE}};
  const absl::StatusOr<Request> decoded = DecodeRequest(grpc::ByteBuffer(slices, 2));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  const Pieces& pieces = std::get<Pieces>(*decoded);
  ASSERT_EQ(pieces.pieces.size(), 1);
  const Piece& piece = pieces.pieces[0];
  EXPECT_EQ(piece.size_bytes(), data.size());
  ASSERT_EQ(piece.data.size(), 2);
  EXPECT_EQ(reinterpret_cast<const char*>(piece.data[0].data()), first.data() + data_at);
  EXPECT_EQ(piece.data[0].size(), first.size() - data_at);
  EXPECT_EQ(reinterpret_cast<const char*>(piece.data[1].data()), second.data());
}

TEST(DecodeRequestTest, KeepsTheSlicesAliveAndMoves) {
  v1::CompressRequest request = OnePiece(1, std::string(50'000, 'y'));
  *request.mutable_pieces()->add_pieces() = Piece1(2, "in a slice of its own");
  absl::StatusOr<Request> decoded = absl::UnknownError("");
  {
    const std::string bytes = request.SerializeAsString();
    decoded = DecodeRequest(CutEvery(bytes, 10));
  }
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  Pieces moved = std::get<Pieces>(*std::move(decoded));
  Pieces again;
  again = std::move(moved);
  EXPECT_TRUE(testing::RunsLieInSlices(again));
  EXPECT_EQ(Normalized(testing::ToProto(Request(std::move(again)))), Normalized(request));
}

TEST(DecodeRequestTest, OtherMembersAreProtobufMessages) {
  v1::CompressRequest open;
  open.mutable_open()->set_prompt_tokens(5);
  open.mutable_open()->mutable_geometry()->set_layer_count(3);
  v1::CompressRequest commit;
  commit.mutable_commit()->set_input_bytes(77);
  for (const v1::CompressRequest& request : {open, commit, v1::CompressRequest()}) {
    for (size_t step : {1, 3, 100}) {
      const absl::StatusOr<Request> decoded =
          DecodeRequest(CutEvery(request.SerializeAsString(), step));
      ASSERT_TRUE(decoded.ok()) << decoded.status();
      ASSERT_TRUE(std::holds_alternative<v1::CompressRequest>(*decoded));
      EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(request));
    }
  }
}

TEST(DecodeRequestTest, ABufferWithoutBytesIsAnEmptyMessage) {
  for (const grpc::ByteBuffer& buffer : {grpc::ByteBuffer(), CutInto("", {0, 0})}) {
    const absl::StatusOr<Request> request = DecodeRequest(buffer);
    ASSERT_TRUE(request.ok()) << request.status();
    ASSERT_TRUE(std::holds_alternative<v1::CompressRequest>(*request));
    EXPECT_EQ(std::get<v1::CompressRequest>(*request).message_case(),
              v1::CompressRequest::MESSAGE_NOT_SET);
    const absl::StatusOr<Response> response = DecodeResponse(buffer);
    ASSERT_TRUE(response.ok()) << response.status();
    EXPECT_EQ(response->message.message_case(), v1::CompressResponse::MESSAGE_NOT_SET);
  }
}

TEST(DecodeRequestTest, SkipsUnknownFieldsAtEveryLevel) {
  const std::string piece = kUnknownFields + Piece1(4, "data").SerializeAsString() + kUnknownFields;
  const std::string pieces = kUnknownFields + Field(1, piece) + kUnknownFields;
  const std::string bytes = kUnknownFields + Field(2, pieces) + kUnknownFields;
  for (size_t step : {1, 2, 1000}) {
    const absl::StatusOr<Request> decoded = DecodeRequest(CutEvery(bytes, step));
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(OnePiece(4, "data")));
  }
}

TEST(DecodeResponseTest, SkipsUnknownFieldsAtEveryLevel) {
  v1::CompressResponse response;
  response.mutable_layer()->set_layer(4);
  const std::string layer = kUnknownFields + response.layer().SerializeAsString() + kUnknownFields;
  *response.mutable_layer()->add_pieces() = Piece1(4, "data");
  const std::string piece = Piece1(4, "data").SerializeAsString() + kUnknownFields;
  const std::string bytes = kUnknownFields + Field(2, layer + Field(5, piece)) + kUnknownFields;
  const absl::StatusOr<Response> decoded = DecodeResponse(CutEvery(bytes, 1));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(response));
}

// A known number with another wire type is an unknown field.
TEST(DecodeRequestTest, SkipsKnownFieldsOfAnotherType) {
  const std::string piece = std::string(
                                "\x0a\x01z\x2d"
                                "1234",
                                8) +
                            Piece1(4, "d").SerializeAsString();
  const std::string bytes = Field(2, std::string("\x08\x05", 2) + Field(1, piece));
  const absl::StatusOr<Request> decoded = DecodeRequest(CutEvery(bytes, 1));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(OnePiece(4, "d")));
}

TEST(DecodeRequestTest, TheLastMemberOfTheOneofWins) {
  v1::CompressRequest commit;
  commit.mutable_commit()->set_input_bytes(9);
  const std::string a = OnePiece(1, "a").SerializeAsString();
  const std::string b = OnePiece(2, "b").SerializeAsString();
  const std::string other = commit.SerializeAsString();
  for (const std::string& bytes :
       {a + other + b, a + other, other + a + b, a + b + other + other}) {
    v1::CompressRequest expected;
    ASSERT_TRUE(expected.ParseFromString(bytes));
    const absl::StatusOr<Request> decoded = DecodeRequest(CutEvery(bytes, 3));
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(expected));
  }
}

TEST(DecodeResponseTest, TheLastMemberOfTheOneofWins) {
  Random random(3);
  for (int i = 0; i < 200; ++i) {
    std::string bytes;
    for (int part = 0; part < 3; ++part) {
      bytes += testing::RandomResponse(&random).SerializeAsString();
    }
    v1::CompressResponse expected;
    ASSERT_TRUE(expected.ParseFromString(bytes));
    const absl::StatusOr<Response> decoded = DecodeResponse(CutRandomly(bytes, &random));
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(expected)) << "message " << i;
  }
}

TEST(DecodeRequestTest, MembersThatLoseAreNotRead) {
  const std::string broken = Field(1, "\xff");  // an `open` that cannot be parsed
  const absl::StatusOr<Request> decoded =
      DecodeRequest(CutEvery(broken + OnePiece(1, "a").SerializeAsString(), 100));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(OnePiece(1, "a")));
}

TEST(DecodeRequestTest, TheLastValueOfAFieldWins) {
  std::string piece = Piece1(1, "first").SerializeAsString() + Piece1(2, "").SerializeAsString();
  piece += Piece1(3, "third").SerializeAsString();
  const absl::StatusOr<Request> decoded = DecodeRequest(CutEvery(Field(2, Field(1, piece)), 2));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(OnePiece(3, "third")));
}

}  // namespace
}  // namespace structkv::wire
