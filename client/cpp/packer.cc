#include "client/cpp/packer.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "structkv/arena.h"

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
  const SharedPlace* place = core_->shared_place();
  const bool rows = tensor == v1::TENSOR_KEYS || tensor == v1::TENSOR_VALUES;
  if (rows && core_->transfers() && !data.empty()) {
    return AddTransfer(layer, tensor, data, offset, owner);
  }
  if (place == nullptr || data.empty() || (!rows && core_->names_rows_alone())) {
    return AddFromHost(layer, tensor, data, offset, owner);
  }
  std::shared_ptr<const void> held = owner;
  std::optional<wire::Range> range = place->Find(data);
  if (rows) {  // read in place
    const char* why = nullptr;
    if (!range.has_value()) {
      why = "lies outside of StreamOptions.regions";
    } else if (range->offset_bytes % Arena::kAlignment != 0) {
      why = "does not begin at a multiple of 64 bytes of its region";
    }
    if (why != nullptr) {
      absl::StatusOr<Bytes> staged = Stage(layer, tensor, data, why);
      if (!staged.ok()) return staged.status();
      range = place->Find(staged->span());
      held = staged->owner();
    }
  }
  if (!range.has_value()) return AddData(layer, tensor, data, offset, owner);
  if (absl::Status status = MakeRoom(); !status.ok()) return status;
  core_->HoldUntilAnswered(layer, std::move(held));
  wire::OutgoingPiece piece;
  piece.range = range;
  AddName(layer, tensor, offset, std::move(piece));
  return absl::OkStatus();
}

absl::Status Packer::AddTransfer(uint32_t layer, v1::Tensor tensor,
                                 absl::Span<const std::byte> data, uint64_t offset,
                                 const std::shared_ptr<const void>& owner) {
  std::shared_ptr<const void> held = owner;
  absl::Span<const std::byte> rows = data;
  if (!core_->gpu()->device().IsOnGpu(data.data())) {
    absl::StatusOr<Bytes> staged = Stage(layer, tensor, data, "is not in a GPU's memory");
    if (!staged.ok()) return staged.status();
    rows = staged->span();
    held = staged->owner();
  }
  if (absl::Status status = MakeRoom(); !status.ok()) return status;
  core_->HoldUntilAnswered(layer, held);
  absl::StatusOr<std::string> key = core_->Transfer(layer, tensor, rows, held);
  if (!key.ok()) return key.status();
  wire::OutgoingPiece piece;
  piece.transfer = {*std::move(key), rows.size()};
  AddName(layer, tensor, offset, std::move(piece));
  return absl::OkStatus();
}

void Packer::AddName(uint32_t layer, v1::Tensor tensor, uint64_t offset,
                     wire::OutgoingPiece piece) {
  piece.layer = layer;
  piece.tensor = tensor;
  piece.offset_bytes = offset;
  pieces_.push_back(std::move(piece));
  filled_ += wire::kPieceOverheadBytes;
}

absl::StatusOr<Bytes> Packer::Stage(uint32_t layer, v1::Tensor tensor,
                                    absl::Span<const std::byte> data, absl::string_view why) {
  absl::StatusOr<Bytes> block = core_->AllocateStaging(data.size(), wait_ == Wait::kForRoom);
  if (!block.ok()) {
    return absl::Status(block.status().code(),
                        absl::StrCat("layer ", layer, ": ", v1::Tensor_Name(tensor), " ", why, "; ",
                                     block.status().message()));
  }
  if (core_->gpu() == nullptr) {
    std::memcpy(block->data(), data.data(), data.size());
    return block;
  }
  absl::Status status = core_->GpuOf(data)->Copy(block->data(), data.data(), data.size());
  if (!status.ok()) return status;
  return block;
}

absl::Status Packer::AddFromHost(uint32_t layer, v1::Tensor tensor,
                                 absl::Span<const std::byte> data, uint64_t offset,
                                 const std::shared_ptr<const void>& owner) {
  if (data.empty() || core_->gpu() == nullptr || !core_->gpu()->device().IsOnGpu(data.data())) {
    return AddData(layer, tensor, data, offset, owner);
  }
  const absl::StatusOr<Bytes> copy = core_->CopyToHost(data);
  if (!copy.ok()) return copy.status();
  return AddData(layer, tensor, copy->span(), offset, copy->owner());
}

// Each piece costs its overhead too, so that many small ones stay within a message.
absl::Status Packer::MakeRoom() {
  const bool full = filled_ + wire::kPieceOverheadBytes >= chunk_ && !pieces_.empty();
  return full ? Flush() : absl::OkStatus();
}

absl::Status Packer::AddData(uint32_t layer, v1::Tensor tensor, absl::Span<const std::byte> data,
                             uint64_t offset, const std::shared_ptr<const void>& owner) {
  while (!data.empty()) {
    if (absl::Status status = MakeRoom(); !status.ok()) return status;
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
      const uint64_t size = piece.range.has_value()      ? piece.range->size_bytes
                            : piece.transfer.has_value() ? piece.transfer->size_bytes
                                                         : piece.data.size();
      core_->NoteSent(piece.layer, piece.tensor, piece.offset_bytes, piece.offset_bytes + size);
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
