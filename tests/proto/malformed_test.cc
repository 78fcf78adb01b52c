// Bytes that are no message: an error that names the byte, whatever the slices.
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/v1/piece_codec.h"
#include "tests/proto/wire_testing.h"

namespace structkv::wire {
namespace {

using std::string_literals::operator""s;
using testing::CutEvery;
using testing::Normalized;

struct Malformed {
  std::string name;
  std::string bytes;
  std::string text;  // of the error, after "message cannot be parsed at byte "
};

void PrintTo(const Malformed& malformed, std::ostream* out) { *out << malformed.name; }

// Whatever the slices.
template <typename Decode>
void CheckError(const Malformed& malformed, Decode decode) {
  const std::string text = "message cannot be parsed at byte " + malformed.text;
  for (size_t step : {1, 2, 3, 1000}) {
    const absl::Status status = decode(CutEvery(malformed.bytes, step)).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_EQ(std::string(status.message()), text) << "slices of " << step;
  }
}

class MalformedTest : public ::testing::TestWithParam<Malformed> {};
TEST_P(MalformedTest, NamesTheByte) {
  CheckError(GetParam(), DecodeRequest);
  CheckError(GetParam(), DecodeResponse);
}

class MalformedPiecesTest : public ::testing::TestWithParam<Malformed> {};
TEST_P(MalformedPiecesTest, NamesTheByte) { CheckError(GetParam(), DecodeRequest); }

const std::string kTenBytes(10, '\x80');

INSTANTIATE_TEST_SUITE_P(
    BothDirections, MalformedTest,
    ::testing::Values(
        Malformed{"tag cut off", "\xf2"s, "1 of 1: a number is cut off"},
        Malformed{"tag of field 0", "\x02\x00"s, "1 of 2: a field number is out of range"},
        Malformed{"tag beyond 32 bits", "\x82\x80\x80\x80\x10\x00"s,
                  "5 of 6: a field number is out of range"},
        Malformed{"tag longer than needed for 32 bits", "\x92\x80\x80\x80\x80\x00\x00"s,
                  "6 of 7: a field number is out of range"},
        Malformed{"tag of 11 bytes", kTenBytes + "\x01"s,
                  "10 of 11: a number has more than 10 bytes"},
        Malformed{"length missing", "\x12"s, "1 of 1: a number is cut off"},
        Malformed{"length cut off", "\x12\x80"s, "2 of 2: a number is cut off"},
        Malformed{"length past the end", "\x12\x05\x0a\x01"s,
                  "2 of 4: a field of 5 bytes has 2 left"},
        Malformed{"longest length", "\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"s,
                  "11 of 11: a field of 18446744073709551615 bytes has 0 left"},
        Malformed{"length of 11 bytes", "\x12"s + kTenBytes + "\x01"s,
                  "11 of 12: a number has more than 10 bytes"},
        Malformed{"start of a group", "\x0b\x0c"s, "1 of 2: groups are not accepted"},
        Malformed{"end of a group", "\xf4\x01"s, "2 of 2: groups are not accepted"},
        Malformed{"wire type 6", "\x16\x00"s, "1 of 2: there is no wire type 6"},
        Malformed{"wire type 7", "\x17\x00"s, "1 of 2: there is no wire type 7"},
        Malformed{"unknown varint cut off", "\x38\xff"s, "2 of 2: a number is cut off"},
        Malformed{"unknown fixed32 cut off", "\x3d\x01\x02\x03"s, "1 of 4: a field is cut off"},
        Malformed{"unknown fixed64 cut off", "\x39\x01\x02\x03\x04\x05\x06\x07"s,
                  "1 of 8: a field is cut off"},
        Malformed{"unknown bytes cut off", "\x3a\x02\x01"s,
                  "2 of 3: a field of 2 bytes has 1 left"}));

INSTANTIATE_TEST_SUITE_P(
    Request, MalformedPiecesTest,
    ::testing::Values(
        Malformed{"group in pieces", "\x12\x01\x0b"s, "3 of 3: groups are not accepted"},
        Malformed{"group in a piece", "\x12\x03\x0a\x01\x0b"s, "5 of 5: groups are not accepted"},
        Malformed{"piece past its parent", "\x12\x02\x0a\x03\x38\x01\x38"s,
                  "4 of 7: a field of 3 bytes has 0 left"},
        Malformed{"data past their piece", "\x12\x05\x0a\x03\x2a\x02x\x38\x01"s,
                  "6 of 9: a field of 2 bytes has 1 left"},
        Malformed{"number past its piece", "\x12\x03\x0a\x01\x08\x38\x01"s,
                  "5 of 7: a number is cut off"},
        Malformed{"checksum past its piece", "\x12\x04\x0a\x02\x21\x00\x38\x01\x38\x01\x38\x01"s,
                  "5 of 12: a fixed64 is cut off"},
        Malformed{"piece layer of 11 bytes", "\x12\x0f\x0a\x0d\x08"s + kTenBytes + "\x01\x00"s,
                  "15 of 17: a number has more than 10 bytes"},
        Malformed{"tag past its piece", "\x12\x03\x0a\x01\xaa\x01\x01"s,
                  "5 of 7: a number is cut off"}));

TEST(MalformedOtherTest, WhatProtobufRefusesSaysHowLongItWas) {
  const absl::Status request = DecodeRequest(CutEvery("\x0a\x02\x0a\x05"s, 1)).status();
  EXPECT_TRUE(absl::IsInvalidArgument(request));
  EXPECT_EQ(std::string(request.message()), "message of 4 bytes is no structkv.v1.CompressRequest");
  const absl::Status opened = DecodeResponse(CutEvery("\x0a\x02\x0a\x05"s, 1)).status();
  EXPECT_TRUE(absl::IsInvalidArgument(opened));
  EXPECT_EQ(std::string(opened.message()), "message of 4 bytes is no structkv.v1.CompressResponse");
  // A layer's and a pivot's own fields: metrics with a number cut off.
  const absl::Status layer = DecodeResponse(CutEvery("\x12\x03\x1a\x01\x08"s, 1)).status();
  EXPECT_TRUE(absl::IsInvalidArgument(layer));
  EXPECT_EQ(std::string(layer.message()), "message cannot be parsed: bad field in `layer`");
  const absl::Status pivot = DecodeResponse(CutEvery("\x1a\x03\x22\x01\x08"s, 1)).status();
  EXPECT_TRUE(absl::IsInvalidArgument(pivot));
  EXPECT_EQ(std::string(pivot.message()), "message cannot be parsed: bad field in `pivot`");
}

// Every prefix of some messages: accepted where protobuf accepts it, with the same content.
template <typename Message, typename Decode>
void CheckPrefixes(const std::string& bytes, Decode decode) {
  int accepted = 0;
  for (size_t size = 0; size <= bytes.size(); ++size) {
    const std::string prefix = bytes.substr(0, size);
    Message expected;
    const bool valid = expected.ParseFromString(prefix);
    accepted += valid ? 1 : 0;
    for (size_t step : {1, 2, 3, 7, 1000}) {
      const auto decoded = decode(CutEvery(prefix, step));
      ASSERT_EQ(decoded.ok(), valid) << size << " of " << bytes.size() << " bytes, slices of "
                                     << step << ": " << decoded.status();
      if (!valid) {
        EXPECT_TRUE(absl::IsInvalidArgument(decoded.status())) << decoded.status();
      } else {
        EXPECT_EQ(Normalized(testing::ToProto(*decoded)), Normalized(expected));
      }
    }
  }
  EXPECT_GT(accepted, 2) << "some prefixes are shorter messages";
  EXPECT_LT(accepted, static_cast<int>(bytes.size()));
}

TEST(TruncationTest, OfARequestIsAsProtobufHasIt) {
  v1::CompressRequest request;
  v1::TensorPiece* piece = request.mutable_pieces()->add_pieces();
  piece->set_layer(300);
  piece->set_tensor(v1::TENSOR_KEYS);
  piece->set_offset_bytes(1 << 20);
  piece->set_xxh3_64(~uint64_t{0});
  piece->set_data("data of a piece");
  *request.mutable_pieces()->add_pieces() = *piece;
  const std::string one = request.SerializeAsString();
  CheckPrefixes<v1::CompressRequest>(one + one + "\x3d\x01\x02\x03\x04"s + one, DecodeRequest);
}

TEST(TruncationTest, OfAResponseIsAsProtobufHasIt) {
  v1::CompressResponse layer;
  layer.mutable_layer()->set_layer(3);
  layer.mutable_layer()->mutable_metrics()->set_entropy(1.5);
  layer.mutable_layer()->add_pieces()->set_data("abc");
  layer.mutable_layer()->set_complete(true);
  v1::CompressResponse pivot;
  pivot.mutable_pivot()->set_pivot_layer(4);
  pivot.mutable_pivot()->add_layers()->set_transition(0.5);
  pivot.mutable_pivot()->add_pieces()->set_data("def");
  v1::CompressResponse summary;
  summary.mutable_summary()->set_fingerprint("0123");
  v1::CompressResponse pull;
  pull.mutable_pull()->set_layer(5);
  pull.mutable_pull()->add_tensors(v1::TENSOR_VALUES);
  pull.mutable_pull()->add_pieces()->set_data("ghi");
  const std::string bytes = layer.SerializeAsString() + pivot.SerializeAsString() +
                            pivot.SerializeAsString() + pull.SerializeAsString() +
                            summary.SerializeAsString();
  CheckPrefixes<v1::CompressResponse>(bytes, DecodeResponse);
}

TEST(TooManyPiecesTest, OneMoreThanTheLimitIsRefused) {
  v1::CompressRequest request;
  for (size_t i = 0; i < kMaxPiecesPerMessage; ++i) request.mutable_pieces()->add_pieces();
  absl::StatusOr<Request> decoded = DecodeRequest(CutEvery(request.SerializeAsString(), 1000));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(std::get<Pieces>(*decoded).pieces.size(), kMaxPiecesPerMessage);

  request.mutable_pieces()->add_pieces();
  decoded = DecodeRequest(CutEvery(request.SerializeAsString(), 1000));
  EXPECT_TRUE(absl::IsInvalidArgument(decoded.status()));
  // Two bytes a piece, after a tag and a length of three bytes.
  EXPECT_EQ(std::string(decoded.status().message()),
            "message cannot be parsed at byte 32774 of 32774: more than 16384 pieces in a message");
}

TEST(TooManyPiecesTest, PiecesOfAMessageInPartsAreCountedTogether) {
  v1::CompressResponse response;
  for (size_t i = 0; i < kMaxPiecesPerMessage / 2 + 1; ++i) response.mutable_layer()->add_pieces();
  const std::string half = response.SerializeAsString();
  EXPECT_TRUE(DecodeResponse(CutEvery(half, 1000)).ok());
  EXPECT_TRUE(absl::IsInvalidArgument(DecodeResponse(CutEvery(half + half, 1000)).status()));
}

}  // namespace
}  // namespace structkv::wire
