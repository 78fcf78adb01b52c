#include "client/cpp/fetch_assembler.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/cache_info.h"
#include "client/cpp/result_places.h"
#include "structkv/sizes.h"

namespace structkv::client::internal {
namespace {

template <typename... Args>
absl::Status Broken(const Args&... args) {
  return absl::DataLossError(absl::StrCat("the server broke the protocol: ", args...));
}

}  // namespace

FetchAssembler::FetchAssembler(const FetchOptions& options, BytesPool* pool,
                               std::function<void(LayerResult, const std::string&)> on_layer)
    : options_(options), pool_(pool), on_layer_(std::move(on_layer)) {}

void FetchAssembler::UseRoom(Bytes room, const wire::Range& range) {
  room_ = std::move(room);
  room_range_ = range;
}

void FetchAssembler::StartStream(const v1::FetchCacheRequest& request) {
  transports_.assign(request.transports().begin(), request.transports().end());
  if (transports_.empty()) transports_.push_back(v1::TRANSPORT_INLINE);
  stream_has_info_ = false;
  has_summary_ = false;  // the stream before may have broken behind it
  skipped_ = received_bytes_;
}

absl::Status FetchAssembler::Add(const wire::FetchResponse& response) {
  const v1::FetchCacheResponse& message = response.message;
  if (has_summary_) return Broken("a message came after the summary");
  if (message.has_info() == stream_has_info_) {
    return Broken(stream_has_info_ ? "`info` came twice" : "the first message is not `info`");
  }
  switch (message.message_case()) {
    case v1::FetchCacheResponse::kInfo:
      stream_has_info_ = true;
      return AddInfo(message.info());
    case v1::FetchCacheResponse::kLayer:
      return AddLayer(message.layer(), response.pieces);
    case v1::FetchCacheResponse::kSummary:
      if (received_bytes_ != info_->total_bytes() ||
          message.summary().total_bytes() != info_->total_bytes() ||
          message.summary().sent_bytes() != received_bytes_ - skipped_) {
        return Broken("FetchSummary says ", message.summary().sent_bytes(), " of ",
                      message.summary().total_bytes(), " bytes, received were ",
                      received_bytes_ - skipped_, " and before them ", skipped_, " of ",
                      info_->total_bytes());
      }
      has_summary_ = true;
      return absl::OkStatus();
    case v1::FetchCacheResponse::MESSAGE_NOT_SET:
      break;  // a later version's message
  }
  return absl::OkStatus();
}

absl::Status FetchAssembler::AddInfo(v1::CacheInfo info) {
  if (info.transport() == v1::TRANSPORT_UNSPECIFIED) info.set_transport(v1::TRANSPORT_INLINE);
  if (std::find(transports_.begin(), transports_.end(), info.transport()) == transports_.end()) {
    return Broken("CacheInfo.transport is ", v1::Transport_Name(info.transport()),
                  ", which the fetch did not name");
  }
  if (info_.has_value()) {
    info_->set_transport(info.transport());
    info_->set_transport_reason(info.transport_reason());
    if (info.SerializeAsString() != info_->SerializeAsString()) {
      return Broken("CacheInfo is another than before the fetch broke");
    }
  } else {
    if (absl::Status status = CheckCacheInfo(info, options_); !status.ok()) return status;
    open_ = OpenOf(info);
    opened_ = OpenedOf(info);
  }
  if (!room_.empty() && ResultBytes(open_, opened_, info.layer_count()) > room_.size()) {
    return Broken("CacheInfo.kept_tokens need ", ResultBytes(open_, opened_, info.layer_count()),
                  " bytes, before they needed ", room_.size());
  }
  if (info_.has_value()) return absl::OkStatus();
  info_ = std::move(info);
  if (options_.on_info) options_.on_info(*info_);
  return StartLayer(0);
}

Bytes FetchAssembler::RoomOf(const Due& due) const {
  if (room_.empty() || (due.tensor != v1::TENSOR_KEYS && due.tensor != v1::TENSOR_VALUES)) {
    return {};
  }
  return {room_.data() + ResultOffset(open_, opened_, index_, due.tensor), due.size, room_.owner()};
}

absl::Status FetchAssembler::StartLayer(uint32_t index) {
  index_ = index;
  due_.clear();
  tensor_ = 0;
  offset_ = 0;
  if (index == info_->layer_count()) return absl::OkStatus();
  layer_ = LayerResult();
  transfer_key_.clear();
  layer_.layer = info_->first_layer() + index;
  layer_.kept_tokens = info_->kept_tokens(static_cast<int>(index));
  layer_.kept_blocks = KeptBlocks(open_, layer_.kept_tokens);
  for (const auto& [tensor, place] :
       {std::pair(v1::TENSOR_POSITIONS, &LayerResult::positions),
        std::pair(v1::TENSOR_KEYS, &LayerResult::keys),
        std::pair(v1::TENSOR_VALUES, &LayerResult::values),
        std::pair(v1::TENSOR_KEY_SCALES, &LayerResult::key_scales),
        std::pair(v1::TENSOR_VALUE_SCALES, &LayerResult::value_scales)}) {
    const uint64_t size = OutputTensorBytes(open_, opened_, layer_.layer, tensor);
    if (size == 0) continue;
    due_.push_back({tensor, size, place});
  }
  for (const Due& due : due_) {
    Bytes& bytes = layer_.*due.place;
    bytes = RoomOf(due);
    if (!bytes.empty()) continue;
    absl::StatusOr<Bytes> given = options_.allocate
                                      ? options_.allocate(layer_.layer, due.tensor, due.size)
                                      : pool_->Acquire(due.size);
    if (!given.ok()) return given.status();
    bytes = *std::move(given);
    if (bytes.size() >= due.size) continue;
    return absl::ResourceExhaustedError(absl::StrCat("FetchOptions.allocate gave ", bytes.size(),
                                                     " bytes for ", v1::Tensor_Name(due.tensor),
                                                     "; ", due.size, " are needed"));
  }
  return absl::OkStatus();
}

absl::Status FetchAssembler::AddLayer(const v1::LayerResult& message, const wire::Pieces& pieces) {
  if (due_.empty() || message.layer() != layer_.layer) {
    return Broken("layer ", message.layer(), " came where ",
                  due_.empty() ? "nothing" : absl::StrCat("layer ", layer_.layer), " was due");
  }
  if (message.kept_tokens() != layer_.kept_tokens || message.kept_blocks() != layer_.kept_blocks) {
    return Broken("layer ", message.layer(), " has ", message.kept_tokens(), " tokens in ",
                  message.kept_blocks(), " blocks, CacheInfo said ", layer_.kept_tokens, " in ",
                  layer_.kept_blocks);
  }
  if (message.has_metrics()) layer_.metrics = message.metrics();
  for (const wire::Piece& piece : pieces.pieces) {
    if (absl::Status status = AddPiece(piece); !status.ok()) return status;
  }
  const bool complete = tensor_ == due_.size();
  if (complete != message.complete()) {
    return Broken("layer ", message.layer(), " is ",
                  complete ? "not marked as complete" : "marked as complete", " with ", tensor_,
                  " of ", due_.size(), " tensors");
  }
  return complete ? CompleteLayer() : absl::OkStatus();
}

absl::Status FetchAssembler::AddPiece(const wire::Piece& piece) {
  const uint64_t size = piece.size_bytes();
  if (tensor_ == due_.size() || piece.layer != layer_.layer ||
      piece.tensor != due_[tensor_].tensor || piece.offset_bytes != offset_ ||
      size > due_[tensor_].size - offset_) {
    return Broken("a piece of tensor ", piece.tensor, " of layer ", piece.layer, " at ",
                  piece.offset_bytes, " of ", size, " bytes is out of place");
  }
  const Due& due = due_[tensor_];
  std::byte* out = (layer_.*due.place).data() + offset_;
  const bool in_room = InRegions(info_->transport()) && !RoomOf(due).empty();
  const bool transferred = info_->transport() == v1::TRANSPORT_NCCL && !RoomOf(due).empty();
  if (piece.transfer.has_value() != transferred) {
    return Broken(
        "a piece of tensor ", piece.tensor, " of layer ", piece.layer, " is ",
        transferred ? "no transfer, and a transfer is due" : "a transfer, which is not due");
  }
  if (absl::Status fits = transferred ? AddTransfer(piece) : absl::OkStatus(); !fits.ok()) {
    return fits;
  }
  if (piece.range.has_value() != in_room) {
    return Broken("a piece of tensor ", piece.tensor, " of layer ", piece.layer, " is ",
                  in_room ? "no range, and a range is due" : "a range, which is not due");
  }
  if (in_room) {
    const uint64_t at = room_range_.offset_bytes + static_cast<uint64_t>(out - room_.data());
    if (piece.range->region != room_range_.region || piece.range->offset_bytes != at) {
      return Broken("a piece of tensor ", piece.tensor, " of layer ", piece.layer, " lies at ",
                    piece.range->offset_bytes, " of region ", piece.range->region, "; ", at,
                    " of region ", room_range_.region, " is due");
    }
  }
  if (!in_room && piece.xxh3_64.has_value() && *piece.xxh3_64 != wire::Checksum(piece.data)) {
    return absl::DataLossError(absl::StrCat(v1::Tensor_Name(due.tensor), " of layer ", piece.layer,
                                            ": checksum mismatch at ", piece.offset_bytes));
  }
  for (const absl::Span<const std::byte> run : piece.data) {
    if (run.empty()) continue;
    std::memcpy(out, run.data(), run.size());
    out += run.size();
  }
  offset_ += size;
  received_bytes_ += size;
  if (offset_ == due.size) {
    ++tensor_;
    offset_ = 0;
  }
  return absl::OkStatus();
}

absl::Status FetchAssembler::AddTransfer(const wire::Piece& piece) {
  const std::string& key = piece.transfer->key;
  if (piece.size_bytes() != due_[tensor_].size) {
    return Broken("a transfer of tensor ", piece.tensor, " of layer ", piece.layer, " has ",
                  piece.size_bytes(), " bytes, ", due_[tensor_].size, " are due");
  }
  if (key.empty() || (!transfer_key_.empty() && transfer_key_ != key)) {
    return Broken("tensor ", piece.tensor, " of layer ", piece.layer,
                  " comes by another transfer than the layer's other rows");
  }
  transfer_key_ = key;
  return absl::OkStatus();
}

absl::Status FetchAssembler::GoBackTo(uint32_t layers) {
  const bool is_there = index_ == layers && tensor_ == 0 && offset_ == 0;
  if (!info_.has_value() || is_there) return absl::OkStatus();
  received_bytes_ = 0;
  for (uint32_t i = 0; i < layers; ++i) {
    received_bytes_ += info_->layer_bytes(static_cast<int>(i));
  }
  return StartLayer(layers);
}

absl::Status FetchAssembler::CompleteLayer() {
  for (const int32_t position : layer_.position_values()) {
    if (position < 0 || static_cast<uint32_t>(position) >= info_->logical_length()) {
      return Broken("layer ", layer_.layer, " keeps position ", position, " of ",
                    info_->logical_length(), " tokens");
    }
  }
  on_layer_(std::exchange(layer_, {}), transfer_key_);
  return StartLayer(index_ + 1);
}

absl::Status FetchAssembler::Finish() const {
  if (has_summary_) return absl::OkStatus();
  return Broken("the stream ended without a summary");
}

}  // namespace structkv::client::internal
