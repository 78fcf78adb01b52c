// Messages that the wire codec writes: protobuf reads them, and the data are not copied.
#include <xxhash.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/v1/piece_codec.h"
#include "tests/proto/wire_testing.h"

namespace structkv::wire {
namespace {

using testing::Flatten;
using testing::Normalized;
using testkit::Random;

absl::Span<const std::byte> AsBytes(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

// A message's pieces as those of a sender, with or without owners.
template <typename Repeated>
std::vector<OutgoingPiece> Outgoing(const Repeated& pieces, Random* random) {
  std::vector<OutgoingPiece> outgoing;
  for (const v1::TensorPiece& piece : pieces) {
    auto data = std::make_shared<std::string>(piece.data());
    OutgoingPiece& out = outgoing.emplace_back();
    out.layer = piece.layer();
    out.tensor = piece.tensor();
    out.offset_bytes = piece.offset_bytes();
    if (piece.has_xxh3_64()) out.xxh3_64 = piece.xxh3_64();
    if (piece.has_range()) {
      out.range = {piece.range().region(), piece.range().offset_bytes(),
                   piece.range().size_bytes()};
      continue;
    }
    if (piece.has_transfer()) {
      out.transfer = {piece.transfer().key(), piece.transfer().size_bytes()};
      continue;
    }
    if (random->Chance(50)) {
      out.data = AsBytes(*data);
      out.owner = std::move(data);
    } else {
      out.data = AsBytes(piece.data());
    }
  }
  return outgoing;
}

size_t SliceCount(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  return slices.size();
}

bool HasSliceAt(const grpc::ByteBuffer& buffer, absl::Span<const std::byte> data) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  for (const grpc::Slice& slice : slices) {
    if (static_cast<const void*>(slice.begin()) == data.data() && slice.size() == data.size()) {
      return true;
    }
  }
  return false;
}

TEST(EncodeRequestTest, ProtobufReadsIt) {
  Random random(10);
  for (int i = 0; i < 300; ++i) {
    const v1::CompressRequest request = testing::RandomPieces(&random);
    const std::string bytes =
        Flatten(EncodeRequest(Outgoing(request.pieces().pieces(), &random), request.prompt()));
    v1::CompressRequest parsed;
    ASSERT_TRUE(parsed.ParseFromString(bytes)) << "message " << i;
    EXPECT_EQ(Normalized(parsed), Normalized(request)) << "message " << i;
  }
}

TEST(EncodeResponseTest, ProtobufReadsIt) {
  Random random(11);
  for (int i = 0; i < 300; ++i) {
    const v1::CompressResponse response = testing::RandomResponse(&random);
    v1::CompressResponse header = response;
    if (header.has_layer()) header.mutable_layer()->clear_pieces();
    if (header.has_pivot()) header.mutable_pivot()->clear_pieces();
    if (header.has_pull()) header.mutable_pull()->clear_pieces();
    const auto& pieces = response.has_layer()  ? response.layer().pieces()
                         : response.has_pull() ? response.pull().pieces()
                                               : response.pivot().pieces();
    const std::string bytes = Flatten(EncodeResponse(header, Outgoing(pieces, &random)));
    v1::CompressResponse parsed;
    ASSERT_TRUE(parsed.ParseFromString(bytes)) << "message " << i;
    EXPECT_EQ(Normalized(parsed), Normalized(response)) << "message " << i;
  }
}

TEST(EncodeFetchedLayerTest, ProtobufReadsIt) {
  Random random(12);
  for (int i = 0; i < 300; ++i) {
    const v1::FetchCacheResponse response = testing::RandomFetchResponse(&random);
    if (!response.has_layer()) continue;
    v1::LayerResult header = response.layer();
    header.clear_pieces();
    const std::string bytes =
        Flatten(EncodeFetchedLayer(header, Outgoing(response.layer().pieces(), &random)));
    v1::FetchCacheResponse parsed;
    ASSERT_TRUE(parsed.ParseFromString(bytes)) << "message " << i;
    EXPECT_EQ(Normalized(parsed), Normalized(response)) << "message " << i;
  }
}

TEST(EncodeTest, WritesAnyMessage) {
  v1::CompressRequest request;
  request.mutable_commit()->set_layer_count(32);
  EXPECT_EQ(Flatten(Encode(request)), request.SerializeAsString());
  EXPECT_EQ(Flatten(Encode(v1::CompressRequest())), "");
}

TEST(EncodeRequestTest, NoPiecesAreAMessageWithoutPieces) {
  v1::CompressRequest parsed;
  ASSERT_TRUE(parsed.ParseFromString(Flatten(EncodeRequest({}))));
  EXPECT_TRUE(parsed.has_pieces());
  EXPECT_EQ(parsed.pieces().pieces_size(), 0);
}

TEST(EncodeRequestTest, OwnedDataAreNotCopied) {
  const auto data = std::make_shared<std::string>(100'000, 'x');
  const auto all = AsBytes(*data);
  const grpc::ByteBuffer buffer = EncodeRequest({{.data = all.subspan(10, 50'000), .owner = data},
                                                 {.data = all.subspan(50'010), .owner = data}});
  EXPECT_TRUE(HasSliceAt(buffer, all.subspan(10, 50'000)));
  EXPECT_TRUE(HasSliceAt(buffer, all.subspan(50'010)));
  EXPECT_EQ(SliceCount(buffer), 4) << "a header and the data, twice";
}

TEST(EncodeRequestTest, SmallDataAreCopiedIntoOneSlice) {
  const auto data = std::make_shared<std::string>(100, 'x');
  const std::vector<OutgoingPiece> pieces(50, {.data = AsBytes(*data), .owner = data});
  const int64_t owners = data.use_count();
  const grpc::ByteBuffer buffer = EncodeRequest(pieces);
  EXPECT_EQ(SliceCount(buffer), 1);
  EXPECT_EQ(data.use_count(), owners);
}

TEST(EncodeRequestTest, DataWithoutAnOwnerAreCopied) {
  std::string data(100'000, 'x');
  const grpc::ByteBuffer buffer = EncodeRequest({{.data = AsBytes(data)}});
  std::memset(data.data(), 'y', data.size());
  v1::CompressRequest parsed;
  ASSERT_TRUE(parsed.ParseFromString(Flatten(buffer)));
  EXPECT_EQ(parsed.pieces().pieces(0).data(), std::string(100'000, 'x'));
}

TEST(EncodeRequestTest, TheOwnerIsReleasedWhenTheLastShareOfTheBufferDies) {
  auto data = std::make_shared<std::string>(100'000, 'x');
  const std::weak_ptr<std::string> alive = data;
  auto buffer = std::make_unique<grpc::ByteBuffer>();
  {
    const OutgoingPiece piece = {.data = AsBytes(*data), .owner = std::move(data)};
    *buffer = EncodeRequest({piece, piece});
    EXPECT_EQ(alive.use_count(), 3) << "the piece's own, and one for each slice";
  }
  EXPECT_EQ(alive.use_count(), 2);
  auto copy = std::make_unique<grpc::ByteBuffer>(*buffer);
  buffer.reset();
  ASSERT_FALSE(alive.expired());
  absl::StatusOr<Request> decoded = DecodeRequest(*copy);
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  copy.reset();
  EXPECT_FALSE(alive.expired()) << "what was decoded points into the slices";
  decoded = absl::UnknownError("");
  EXPECT_TRUE(alive.expired());
}

TEST(EncodeRequestTest, OverheadOfAPieceIsBounded) {
  const OutgoingPiece largest = {.layer = UINT32_MAX,
                                 .tensor = static_cast<v1::Tensor>(-1),
                                 .offset_bytes = UINT64_MAX,
                                 .xxh3_64 = UINT64_MAX};
  const std::string data(3'000'000, 'x');
  for (size_t size : {size_t{0}, size_t{1}, size_t{127}, size_t{128}, data.size()}) {
    OutgoingPiece piece = largest;
    piece.data = AsBytes(data).subspan(0, size);
    const size_t one = EncodeRequest({piece}).Length();
    const size_t two = EncodeRequest({piece, piece}).Length();
    EXPECT_LE(two - one, size + kPieceOverheadBytes) << "data of " << size << " bytes";
  }
}

TEST(ChecksumTest, IsThatOfTheWholeWhereverItIsCut) {
  Random random(12);
  std::string data(5000, '\0');
  for (char& byte : data) byte = static_cast<char>(random.Next());
  // Sizes at which XXH3 changes its way of computing.
  for (size_t size : {0, 1, 16, 17, 128, 129, 240, 241, 1024, 5000}) {
    const uint64_t whole = XXH3_64bits(data.data(), size);
    const auto bytes = AsBytes(data).subspan(0, size);
    EXPECT_EQ(Checksum({bytes}), whole) << size << " bytes";
    for (size_t cut = 0; cut <= size; cut += 1 + size / 100) {
      EXPECT_EQ(Checksum({bytes.subspan(0, cut), bytes.subspan(cut)}), whole) << "cut at " << cut;
    }
    std::vector<absl::Span<const std::byte>> runs;
    for (size_t i = 0; i < size; ++i) runs.push_back(bytes.subspan(i, 1));
    EXPECT_EQ(Checksum(runs), whole) << size << " runs";
  }
}

}  // namespace
}  // namespace structkv::wire
