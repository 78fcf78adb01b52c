// Hand-written codec of the one hot message, `TensorPieces`, inside `CompressRequest`,
// `CompressResponse` and `FetchCacheResponse`: tensor bytes go between gRPC's slices and the
// caller's memory without a copy through a protobuf `bytes` field. Everything else on the stream is
// ordinary protobuf. What this writes any protobuf library reads, and the reverse.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "grpcpp/support/byte_buffer.h"
#include "structkv/v1/compression.pb.h"
#include "structkv/v1/held_cache.pb.h"

namespace structkv::wire {

// A `RegionRange`.
struct Range {
  uint32_t region = 0;
  uint64_t offset_bytes = 0;
  uint64_t size_bytes = 0;
};

// A `PairTransfer`.
struct Transfer {
  std::string key;
  uint64_t size_bytes = 0;
};

// One `TensorPiece`. `data` is a list of runs, in order, that point into received slices or into
// the sender's memory.
struct Piece {
  uint32_t layer = 0;
  int tensor = 0;  // v1::Tensor, or an unknown number
  uint64_t offset_bytes = 0;
  std::optional<uint64_t> xxh3_64;
  absl::InlinedVector<absl::Span<const std::byte>, 4> data;
  // One of these in place of `data`.
  std::optional<Range> range;
  std::optional<Transfer> transfer;

  uint64_t size_bytes() const;
};

// Pieces that a received message may have: each takes more memory than its bytes where it is
// nearly empty, so their number is limited too.
inline constexpr size_t kMaxPiecesPerMessage = 16384;

// A received message: the slices, which keep the memory alive, and what they say. Move-only: small
// slices hold their bytes within themselves, so a copy's pieces would point into the original.
struct Pieces {
  Pieces() = default;
  Pieces(Pieces&&) = default;
  Pieces& operator=(Pieces&&) = default;

  uint32_t prompt = 0;  // of a batch
  std::vector<grpc::Slice> slices;
  std::vector<Piece> pieces;
};

// A decoded `CompressRequest`: its `pieces`, or any of the other alternatives as a protobuf
// message.
using Request = std::variant<v1::CompressRequest, Pieces>;
// INVALID_ARGUMENT for bytes that are no such message, that hold a group, or that hold more than
// kMaxPiecesPerMessage pieces. The text names the byte, or, where protobuf refused a member that is
// left to it, that member. Never reads past the slices; unknown fields are skipped. Where several
// members of the oneof are set the last one wins, as protobuf has it, and the others are skipped
// unread.
absl::StatusOr<Request> DecodeRequest(const grpc::ByteBuffer& buffer);

// A decoded `CompressResponse`: for `layer`, `pivot` and `pull` the message without its pieces, and
// the pieces beside it.
struct Response {
  v1::CompressResponse message;
  Pieces pieces;
};
absl::StatusOr<Response> DecodeResponse(const grpc::ByteBuffer& buffer);

// The same of a `FetchCacheResponse` and its `layer`.
struct FetchResponse {
  v1::FetchCacheResponse message;
  Pieces pieces;
};
absl::StatusOr<FetchResponse> DecodeFetchResponse(const grpc::ByteBuffer& buffer);

// Keeps the memory behind a piece alive until the transport has sent it.
using Keepalive = std::shared_ptr<const void>;

// A piece to send, of memory that `owner` keeps alive. One contiguous run. Without an owner the
// data are copied. With a `range` or a `transfer` the data go another way, and only that is said.
struct OutgoingPiece {
  uint32_t layer = 0;
  v1::Tensor tensor = v1::TENSOR_UNSPECIFIED;
  uint64_t offset_bytes = 0;
  std::optional<uint64_t> xxh3_64;
  absl::Span<const std::byte> data;
  Keepalive owner;
  std::optional<Range> range;
  std::optional<Transfer> transfer;
};

// Bytes that a piece takes in a message beside its data and the key of its transfer, at most.
inline constexpr size_t kPieceOverheadBytes = 64;

// `CompressRequest{pieces}`. The data are not copied, except small ones (cheaper than a slice of
// their own).
grpc::ByteBuffer EncodeRequest(absl::Span<const OutgoingPiece> pieces, uint32_t prompt = 0);
// `message` (its `layer`, `pivot` or `pull` set, without pieces) with the pieces added.
grpc::ByteBuffer EncodeResponse(const v1::CompressResponse& message,
                                absl::Span<const OutgoingPiece> pieces);
// `FetchCacheResponse{layer}`, the same way.
grpc::ByteBuffer EncodeFetchedLayer(const v1::LayerResult& layer,
                                    absl::Span<const OutgoingPiece> pieces);
// Any other message.
grpc::ByteBuffer Encode(const google::protobuf::MessageLite& message);

// XXH3 (64 bit, seed 0) over the runs.
uint64_t Checksum(absl::Span<const absl::Span<const std::byte>> data);

}  // namespace structkv::wire
