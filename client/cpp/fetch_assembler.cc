#include "client/cpp/fetch_assembler.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "structkv/held_cache.h"
#include "structkv/sizes.h"

namespace structkv::client::internal {
namespace {

template <typename... Args>
absl::Status Broken(const Args&... args) {
  return absl::DataLossError(absl::StrCat("the server broke the protocol: ", args...));
}

absl::Status CheckInfo(const v1::CacheInfo& info) {
  const uint32_t layers = info.layer_count();
  if (layers == 0 || uint64_t{info.first_layer()} + layers > info.geometry().layer_count()) {
    return Broken("CacheInfo has layers ", info.first_layer(), " and ", layers - 1, " more, of ",
                  info.geometry().layer_count());
  }
  if (static_cast<uint32_t>(info.kept_tokens_size()) != layers ||
      static_cast<uint32_t>(info.layer_bytes_size()) != layers) {
    return Broken("CacheInfo has kept_tokens of ", info.kept_tokens_size(),
                  " layers and layer_bytes of ", info.layer_bytes_size(), ", for ", layers);
  }
  uint64_t total = 0;
  for (uint32_t i = 0; i < layers; ++i) {
    const uint32_t kept = info.kept_tokens(static_cast<int>(i));
    if (kept > info.logical_length()) {
      return Broken("CacheInfo.kept_tokens is ", kept, " of ", info.logical_length(), " tokens");
    }
    total += info.layer_bytes(static_cast<int>(i));
  }
  if (total != info.total_bytes()) {
    return Broken("CacheInfo.total_bytes is ", info.total_bytes(), ", its layers have ", total);
  }
  return absl::OkStatus();
}

}  // namespace

FetchAssembler::FetchAssembler(ResultAllocator allocate, BytesPool* pool,
                               std::function<void(const v1::CacheInfo&)> on_info,
                               std::function<void(LayerResult)> on_layer)
    : allocate_(std::move(allocate)),
      pool_(pool),
      on_info_(std::move(on_info)),
      on_layer_(std::move(on_layer)) {}

void FetchAssembler::StartStream() {
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

absl::Status FetchAssembler::AddInfo(const v1::CacheInfo& info) {
  if (info_.has_value()) {
    if (info.SerializeAsString() == info_->SerializeAsString()) return absl::OkStatus();
    return Broken("CacheInfo is another than before the fetch broke");
  }
  if (absl::Status status = CheckInfo(info); !status.ok()) return status;
  info_ = info;
  open_ = OpenOf(info);
  opened_ = OpenedOf(info);
  if (on_info_) on_info_(info);
  return StartLayer(0);
}

absl::Status FetchAssembler::StartLayer(uint32_t index) {
  index_ = index;
  due_.clear();
  tensor_ = 0;
  offset_ = 0;
  if (index == info_->layer_count()) return absl::OkStatus();
  layer_ = LayerResult();
  layer_.layer = info_->first_layer() + index;
  layer_.kept_tokens = info_->kept_tokens(static_cast<int>(index));
  layer_.kept_blocks = KeptBlocks(open_, layer_.kept_tokens);
  uint64_t bytes = 0;
  for (const auto& [tensor, place] :
       {std::pair(v1::TENSOR_POSITIONS, &LayerResult::positions),
        std::pair(v1::TENSOR_KEYS, &LayerResult::keys),
        std::pair(v1::TENSOR_VALUES, &LayerResult::values),
        std::pair(v1::TENSOR_KEY_SCALES, &LayerResult::key_scales),
        std::pair(v1::TENSOR_VALUE_SCALES, &LayerResult::value_scales)}) {
    const uint64_t size = OutputTensorBytes(open_, opened_, layer_.layer, tensor);
    if (size == 0) continue;
    bytes += size;
    due_.push_back({tensor, size, place});
  }
  if (bytes != info_->layer_bytes(static_cast<int>(index))) {
    return Broken("CacheInfo.layer_bytes is ", info_->layer_bytes(static_cast<int>(index)),
                  " of layer ", layer_.layer, ", whose tensors have ", bytes);
  }
  for (const Due& due : due_) {
    layer_.*due.place =
        allocate_ ? allocate_(layer_.layer, due.tensor, due.size) : pool_->Acquire(due.size);
    if ((layer_.*due.place).size() >= due.size) continue;
    return absl::ResourceExhaustedError(
        absl::StrCat("FetchOptions.allocate gave ", (layer_.*due.place).size(), " bytes for ",
                     v1::Tensor_Name(due.tensor), "; ", due.size, " are needed"));
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
  if (piece.range.has_value()) {
    return Broken("a piece of tensor ", piece.tensor, " of layer ", piece.layer,
                  " is a range, which no fetch asked for");
  }
  if (piece.xxh3_64.has_value() && *piece.xxh3_64 != wire::Checksum(piece.data)) {
    return absl::DataLossError(absl::StrCat(v1::Tensor_Name(due_[tensor_].tensor), " of layer ",
                                            piece.layer, ": checksum mismatch at ",
                                            piece.offset_bytes));
  }
  std::byte* out = (layer_.*due_[tensor_].place).data() + offset_;
  for (const absl::Span<const std::byte> run : piece.data) {
    if (run.empty()) continue;
    std::memcpy(out, run.data(), run.size());
    out += run.size();
  }
  offset_ += size;
  received_bytes_ += size;
  if (offset_ == due_[tensor_].size) {
    ++tensor_;
    offset_ = 0;
  }
  return absl::OkStatus();
}

absl::Status FetchAssembler::CompleteLayer() {
  for (const int32_t position : layer_.position_values()) {
    if (position < 0 || static_cast<uint32_t>(position) >= info_->logical_length()) {
      return Broken("layer ", layer_.layer, " keeps position ", position, " of ",
                    info_->logical_length(), " tokens");
    }
  }
  on_layer_(std::exchange(layer_, {}));
  return StartLayer(index_ + 1);
}

absl::Status FetchAssembler::Finish() const {
  if (has_summary_) return absl::OkStatus();
  return Broken("the stream ended without a summary");
}

}  // namespace structkv::client::internal
