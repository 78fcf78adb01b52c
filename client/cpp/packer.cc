#include "client/cpp/packer.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace structkv::client::internal {
namespace {

// What a message takes beside its pieces.
constexpr size_t kMessageOverheadBytes = 64;

size_t ChunkBytes(const SessionCore& core) {
  const size_t limit = core.opened().max_request_message_bytes();
  const size_t overhead = kMessageOverheadBytes + 2 * wire::kPieceOverheadBytes;
  size_t chunk = std::max<size_t>(core.stream_options().chunk_bytes, 1);
  if (limit > 2 * overhead) chunk = std::min(chunk, limit - overhead);
  return chunk;
}

}  // namespace

Packer::Packer(SessionCore* core, Wait wait)
    : core_(core), wait_(wait), chunk_(ChunkBytes(*core)) {}

absl::Status Packer::Add(uint32_t layer, v1::Tensor tensor, absl::Span<const std::byte> data,
                         uint64_t offset, const std::shared_ptr<const void>& owner) {
  while (!data.empty()) {
    // Each piece costs its overhead too, so that many small ones stay within a message.
    if (filled_ + wire::kPieceOverheadBytes >= chunk_ && !pieces_.empty()) {
      absl::Status status = Flush();
      if (!status.ok()) return status;
    }
    const size_t room = chunk_ - std::min(chunk_ - 1, filled_);
    const absl::Span<const std::byte> part = data.subspan(0, std::min(room, data.size()));
    AddPiece(layer, tensor, part, offset, owner);
    offset += part.size();
    data.remove_prefix(part.size());
  }
  return absl::OkStatus();
}

absl::Status Packer::Flush() {
  if (pieces_.empty()) return absl::OkStatus();
  const grpc::ByteBuffer message = wire::EncodeRequest(pieces_, core_->index());
  absl::Status status =
      wait_ == Wait::kForRoom ? core_->Write(message, bytes_) : core_->WriteNow(message, bytes_);
  if (status.ok()) {
    for (const wire::OutgoingPiece& piece : pieces_) {
      core_->NoteSent(piece.layer, piece.tensor, piece.offset_bytes,
                      piece.offset_bytes + piece.data.size());
    }
  }
  pieces_.clear();
  filled_ = bytes_ = 0;
  return status;
}

void Packer::AddPiece(uint32_t layer, v1::Tensor tensor, absl::Span<const std::byte> part,
                      uint64_t offset, const std::shared_ptr<const void>& owner) {
  wire::OutgoingPiece piece;
  piece.layer = layer;
  piece.tensor = tensor;
  piece.offset_bytes = offset;
  piece.data = part;
  piece.owner = owner;
  if (owner == nullptr) {
    auto copy = std::shared_ptr<std::byte[]>(new std::byte[part.size()]);
    std::memcpy(copy.get(), part.data(), part.size());
    piece.data = absl::MakeConstSpan(copy.get(), part.size());
    piece.owner = std::move(copy);
  }
  if (core_->stream_options().checksums) {
    piece.xxh3_64 = wire::Checksum(absl::MakeConstSpan(&piece.data, 1));
  }
  pieces_.push_back(std::move(piece));
  filled_ += part.size() + wire::kPieceOverheadBytes;
  bytes_ += part.size();
}

}  // namespace structkv::client::internal
