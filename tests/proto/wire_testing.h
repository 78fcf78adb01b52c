// What tests and fuzzers of the wire codec share: messages cut into slices, random messages, and
// what was decoded as protobuf's own messages, to be compared.
#pragma once

#include <cstddef>
#include <string>

#include "absl/types/span.h"
#include "grpcpp/support/byte_buffer.h"
#include "structkv/v1/compression.pb.h"
#include "structkv/v1/piece_codec.h"
#include "tests/testing/numbers.h"

namespace structkv::wire::testing {

// A buffer of one slice for each of `lengths`, and one for what is left; lengths past the end of
// the bytes are ignored, empty slices are kept.
grpc::ByteBuffer CutInto(const std::string& bytes, absl::Span<const size_t> lengths);
// A buffer of slices of `step` bytes.
grpc::ByteBuffer CutEvery(const std::string& bytes, size_t step);
// A buffer of slices of random lengths.
grpc::ByteBuffer CutRandomly(const std::string& bytes, testkit::Random* random);

// All bytes of a buffer.
std::string Flatten(const grpc::ByteBuffer& buffer);

// What was decoded, as protobuf's message.
v1::CompressRequest ToProto(const Request& request);
v1::CompressResponse ToProto(const Response& response);
v1::FetchCacheResponse ToProto(const FetchResponse& response);

// What the codec tells of a message: without unknown fields, and without the difference between no
// data and empty data. Serialized, so that two can be compared.
std::string Normalized(v1::CompressRequest request);
std::string Normalized(v1::CompressResponse response);
std::string Normalized(v1::FetchCacheResponse response);

// Whether every run lies in a slice of the message.
bool RunsLieInSlices(const Pieces& pieces);

v1::TensorPiece RandomPiece(testkit::Random* random);
// A request with `pieces`.
v1::CompressRequest RandomPieces(testkit::Random* random);
// A response with any member of its oneof, or none.
v1::CompressResponse RandomResponse(testkit::Random* random);
v1::FetchCacheResponse RandomFetchResponse(testkit::Random* random);

}  // namespace structkv::wire::testing
