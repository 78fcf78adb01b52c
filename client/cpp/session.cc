#include "structkv/session.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/cpp/session_core.h"
#include "structkv/sizes.h"
#include "structkv/v1/piece_codec.h"

namespace structkv::client {
namespace {

// What a message takes beside its pieces.
constexpr size_t kMessageOverheadBytes = 64;

// Collects pieces into messages of at most a given number of tensor bytes.
class Packer {
 public:
  Packer(internal::SessionCore* core, size_t chunk_bytes) : core_(core), chunk_(chunk_bytes) {}

  absl::Status Add(uint32_t layer, v1::Tensor tensor, absl::Span<const std::byte> data,
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

  absl::Status Flush() {
    if (pieces_.empty()) return absl::OkStatus();
    grpc::ByteBuffer message = wire::EncodeRequest(pieces_);
    absl::Status status = core_->Write(message, bytes_, /*last=*/false);
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

 private:
  void AddPiece(uint32_t layer, v1::Tensor tensor, absl::Span<const std::byte> part,
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
    if (core_->options().checksums) {
      piece.xxh3_64 = wire::Checksum(absl::MakeConstSpan(&piece.data, 1));
    }
    pieces_.push_back(std::move(piece));
    filled_ += part.size() + wire::kPieceOverheadBytes;
    bytes_ += part.size();
  }

  internal::SessionCore* const core_;
  const size_t chunk_;
  std::vector<wire::OutgoingPiece> pieces_;
  size_t filled_ = 0;  // with overheads
  size_t bytes_ = 0;   // tensor bytes alone
};

size_t ChunkBytes(const internal::SessionCore& core) {
  const size_t limit = core.opened().max_request_message_bytes();
  const size_t overhead = kMessageOverheadBytes + 2 * wire::kPieceOverheadBytes;
  size_t chunk = std::max<size_t>(core.options().chunk_bytes, 1);
  if (limit > 2 * overhead) chunk = std::min(chunk, limit - overhead);
  return chunk;
}

}  // namespace

CompressSession::CompressSession(std::unique_ptr<internal::SessionCore> core)
    : core_(std::move(core)) {}

CompressSession::~CompressSession() { core_->Close(); }

const v1::Open& CompressSession::open() const { return core_->open(); }

const v1::Opened& CompressSession::opened() const { return core_->opened(); }

absl::Status CompressSession::Send(uint32_t layer, v1::Tensor tensor,
                                   absl::Span<const std::byte> data, uint64_t offset_bytes,
                                   const std::shared_ptr<const void>& owner) {
  absl::Status status = core_->CheckSending();
  if (!status.ok()) return status;
  if (data.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("Send: no data for ", v1::Tensor_Name(tensor), " of layer ", layer));
  }
  if (tensor == v1::TENSOR_POSITIONS) core_->NoteSkeletonLayer(layer);
  Packer packer(core_.get(), ChunkBytes(*core_));
  status = packer.Add(layer, tensor, data, offset_bytes, owner);
  if (!status.ok()) return status;
  return packer.Flush();
}

absl::Status CompressSession::SendLayer(uint32_t layer, const LayerTensors& tensors) {
  absl::Status status = core_->CheckSending();
  if (!status.ok()) return status;
  const std::pair<v1::Tensor, absl::Span<const std::byte>> all[] = {
      {v1::TENSOR_WINDOW_QUERIES, tensors.window_queries},
      {v1::TENSOR_WINDOW_LSE, tensors.window_lse},
      {v1::TENSOR_SALIENCY, tensors.saliency},
      {v1::TENSOR_KEYS, tensors.keys},
      {v1::TENSOR_VALUES, tensors.values},
  };
  Packer packer(core_.get(), ChunkBytes(*core_));
  if (!tensors.positions.empty()) {
    core_->NoteSkeletonLayer(layer);
    const absl::Span<const std::byte> positions(
        reinterpret_cast<const std::byte*>(tensors.positions.data()),
        tensors.positions.size() * sizeof(int32_t));
    status = packer.Add(layer, v1::TENSOR_POSITIONS, positions, 0, nullptr);
    if (!status.ok()) return status;
  }
  for (const auto& [tensor, data] : all) {
    status = packer.Add(layer, tensor, data, 0, tensors.owner);
    if (!status.ok()) return status;
  }
  return packer.Flush();
}

absl::Status CompressSession::SendChunk(uint32_t layer, uint32_t first_token, uint32_t tokens,
                                        const ChunkTensors& chunk) {
  absl::Status status = core_->CheckSending();
  if (!status.ok()) return status;
  const v1::Open& open = core_->open();
  const uint64_t prompt_tokens = open.prompt_tokens();
  if (tokens == 0 || first_token >= prompt_tokens || tokens > prompt_tokens - first_token) {
    return absl::InvalidArgumentError(absl::StrCat("SendChunk: ", tokens, " tokens from ",
                                                   first_token, " on are not within the prompt's ",
                                                   prompt_tokens));
  }
  // Rows of all heads that lie together, and how often such a run comes in the tensor.
  const bool head_first = open.layout() == v1::LAYOUT_HEAD_TOKEN_DIM;
  const uint64_t runs = head_first ? open.geometry().kv_head_count() : 1;
  Packer packer(core_.get(), ChunkBytes(*core_));
  for (const auto& [tensor, data] :
       {std::pair(v1::TENSOR_KEYS, chunk.keys), std::pair(v1::TENSOR_VALUES, chunk.values)}) {
    const uint64_t run_bytes = InputTensorBytes(open, core_->opened(), tensor) / runs;
    const uint64_t size = run_bytes / prompt_tokens * tokens;
    if (data.size() != runs * size) {
      return absl::InvalidArgumentError(absl::StrCat("SendChunk: ", v1::Tensor_Name(tensor), " of ",
                                                     tokens, " tokens has ", data.size(),
                                                     " bytes; ", runs * size, " are needed"));
    }
    for (uint64_t run = 0; run < runs && size > 0; ++run) {
      status = packer.Add(layer, tensor, data.subspan(run * size, size),
                          run * run_bytes + run_bytes / prompt_tokens * first_token, chunk.owner);
      if (!status.ok()) return status;
    }
  }
  return packer.Flush();
}

absl::Status CompressSession::Commit() { return core_->Commit(); }

absl::StatusOr<Event> CompressSession::NextEvent() { return core_->NextEvent(); }

absl::StatusOr<Compressed> CompressSession::Collect() {
  Compressed compressed;
  compressed.opened = core_->opened();
  while (true) {
    absl::StatusOr<Event> event = core_->NextEvent();
    if (!event.ok()) return event.status();
    if (auto* layer = std::get_if<LayerResult>(&*event)) {
      compressed.layers.push_back(std::move(*layer));
    } else if (auto* pivot = std::get_if<PivotResult>(&*event)) {
      compressed.pivot = std::move(*pivot);
    } else {
      compressed.summary = std::get<v1::Summary>(*std::move(event));
      break;
    }
  }
  std::sort(compressed.layers.begin(), compressed.layers.end(),
            [](const LayerResult& a, const LayerResult& b) { return a.layer < b.layer; });
  return compressed;
}

absl::StatusOr<v1::Summary> CompressSession::Wait() { return core_->Wait(); }

void CompressSession::Cancel() { core_->Cancel(); }

}  // namespace structkv::client
