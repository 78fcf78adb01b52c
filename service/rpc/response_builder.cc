#include "service/rpc/response_builder.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "absl/types/span.h"
#include "service/rpc/message_room.h"
#include "service/rpc/open_decoder.h"
#include "structkv/v1/compression.pb.h"
#include "structkv/v1/piece_codec.h"

namespace structkv::rpc {
namespace {

// One whole tensor on its way out.
struct OutgoingTensor {
  v1::Tensor tensor;
  absl::Span<const std::byte> data;
  wire::Keepalive owner;
  // One of these in place of `data`.
  std::optional<wire::Range> range;
  std::optional<wire::Transfer> transfer;

  bool elsewhere() const { return range.has_value() || transfer.has_value(); }
};

OutgoingTensor FromBuffer(v1::Tensor tensor, engine::Buffer buffer) {
  auto owner = std::make_shared<engine::Buffer>(std::move(buffer));
  const absl::Span<const std::byte> data = owner->span();
  return {tensor, data, std::move(owner)};
}

// Kept rows of a layer.
OutgoingTensor FromRows(v1::Tensor tensor, int64_t layer, engine::Buffer rows,
                        const transport::ResultPlace& place) {
  const transport::ResultSource source = place.SourceOf(layer, rows.span());
  if (const auto* range = std::get_if<transport::RegionRange>(&source)) {
    return {.tensor = tensor,
            .range = wire::Range{range->region, range->offset_bytes, range->size_bytes}};
  }
  if (const auto* transfer = std::get_if<transport::PairTransfer>(&source)) {
    return {.tensor = tensor, .transfer = wire::Transfer{transfer->key, transfer->size_bytes}};
  }
  return FromBuffer(tensor, std::move(rows));
}

template <typename T>
OutgoingTensor FromVector(v1::Tensor tensor, std::vector<T> values) {
  auto owner = std::make_shared<std::vector<T>>(std::move(values));
  const absl::Span<const std::byte> data(reinterpret_cast<const std::byte*>(owner->data()),
                                         owner->size() * sizeof(T));
  return {tensor, data, std::move(owner)};
}

// Fills messages to the limit, one after the other. `Start` resets the header for the next message,
// `Last` marks the last one.
class Cutter {
 public:
  Cutter(uint32_t layer, int64_t max_message_bytes, std::vector<OutgoingMessage>* messages)
      : layer_(layer), max_(max_message_bytes), messages_(messages) {}

  template <typename Start, typename Last>
  void Cut(absl::Span<const OutgoingTensor> tensors, v1::CompressResponse* header, Start start,
           Last last) {
    MessageRoom room(max_, *header);
    for (const OutgoingTensor& tensor : tensors) {
      if (tensor.elsewhere()) {
        const size_t key_bytes = tensor.transfer.has_value() ? tensor.transfer->key.size() : 0;
        while (!room.TakeElsewhere(key_bytes)) {
          Flush(*header);
          start(header);
          room = MessageRoom(max_, *header);
        }
        pieces_.push_back({.layer = layer_,
                           .tensor = tensor.tensor,
                           .range = tensor.range,
                           .transfer = tensor.transfer});
        continue;
      }
      int64_t offset = 0;
      const auto size = static_cast<int64_t>(tensor.data.size());
      while (offset < size) {
        const int64_t take = room.Take(size - offset);
        if (take == 0) {
          Flush(*header);
          start(header);
          room = MessageRoom(max_, *header);
          continue;
        }
        pieces_.push_back(
            {.layer = layer_,
             .tensor = tensor.tensor,
             .offset_bytes = static_cast<uint64_t>(offset),
             .data = tensor.data.subspan(static_cast<size_t>(offset), static_cast<size_t>(take)),
             .owner = tensor.owner});
        offset += take;
      }
    }
    last(header);
    Flush(*header);
  }

 private:
  void Flush(const v1::CompressResponse& header) {
    OutgoingMessage message;
    message.prompt = header.prompt();
    for (const wire::OutgoingPiece& piece : pieces_) {
      message.tensor_bytes += static_cast<int64_t>(piece.data.size());
      if (piece.range.has_value()) {
        message.elsewhere_bytes += static_cast<int64_t>(piece.range->size_bytes);
      }
      if (piece.transfer.has_value()) {
        message.elsewhere_bytes += static_cast<int64_t>(piece.transfer->size_bytes);
      }
    }
    message.bytes = wire::EncodeResponse(header, pieces_);
    messages_->push_back(std::move(message));
    pieces_.clear();
  }

  const uint32_t layer_;
  const int64_t max_;
  std::vector<OutgoingMessage>* const messages_;
  std::vector<wire::OutgoingPiece> pieces_;
};

}  // namespace

std::vector<OutgoingMessage> BuildLayer(engine::LayerOutput output, int64_t max_message_bytes,
                                        uint32_t prompt, const transport::ResultPlace& place) {
  const auto layer = static_cast<uint32_t>(output.layer);
  v1::CompressResponse header;
  header.set_prompt(prompt);
  header.mutable_layer()->set_layer(layer);
  header.mutable_layer()->set_kept_tokens(static_cast<uint32_t>(output.kept_tokens));
  header.mutable_layer()->set_kept_blocks(static_cast<uint32_t>(output.kept_blocks));
  if (output.metrics.has_value()) {
    *header.mutable_layer()->mutable_metrics() = EncodeMetrics(output.layer, *output.metrics);
  }
  const OutgoingTensor tensors[] = {
      FromVector(v1::TENSOR_POSITIONS, std::move(output.positions)),
      FromRows(v1::TENSOR_KEYS, output.layer, std::move(output.keys), place),
      FromRows(v1::TENSOR_VALUES, output.layer, std::move(output.values), place),
      FromBuffer(v1::TENSOR_KEY_SCALES, std::move(output.key_scales)),
      FromBuffer(v1::TENSOR_VALUE_SCALES, std::move(output.value_scales)),
      FromBuffer(v1::TENSOR_SALIENCY, std::move(output.saliency)),
  };
  std::vector<OutgoingMessage> messages;
  Cutter(layer, max_message_bytes, &messages)
      .Cut(
          tensors, &header,
          [](v1::CompressResponse* next) { next->mutable_layer()->clear_metrics(); },
          [](v1::CompressResponse* next) { next->mutable_layer()->set_complete(true); });
  return messages;
}

std::vector<OutgoingMessage> BuildPivot(engine::PivotResult result, int64_t max_message_bytes,
                                        uint32_t prompt) {
  v1::CompressResponse header;
  header.set_prompt(prompt);
  *header.mutable_pivot() = EncodePivot(result.decision);
  const OutgoingTensor tensors[] = {
      FromVector(v1::TENSOR_SKELETON_POSITIONS, std::move(result.skeleton)),
      FromVector(v1::TENSOR_CENTRALITY, std::move(result.centrality)),
  };
  std::vector<OutgoingMessage> messages;
  Cutter(header.pivot().pivot_layer(), max_message_bytes, &messages)
      .Cut(
          tensors, &header,
          [](v1::CompressResponse* next) { next->mutable_pivot()->clear_layers(); },
          [](v1::CompressResponse* next) { next->mutable_pivot()->set_complete(true); });
  return messages;
}

std::vector<OutgoingMessage> BuildPull(engine::RowPull pull, int64_t max_message_bytes,
                                       uint32_t prompt) {
  v1::CompressResponse header;
  header.set_prompt(prompt);
  header.mutable_pull()->set_layer(static_cast<uint32_t>(pull.layer));
  header.mutable_pull()->set_kept_tokens(static_cast<uint32_t>(pull.kept_tokens));
  if (pull.keys) header.mutable_pull()->add_tensors(v1::TENSOR_KEYS);
  header.mutable_pull()->add_tensors(v1::TENSOR_VALUES);
  const OutgoingTensor tensors[] = {FromVector(v1::TENSOR_POSITIONS, std::move(pull.positions))};
  std::vector<OutgoingMessage> messages;
  Cutter(header.pull().layer(), max_message_bytes, &messages)
      .Cut(
          tensors, &header, [](v1::CompressResponse*) {},
          [](v1::CompressResponse* next) { next->mutable_pull()->set_complete(true); });
  return messages;
}

}  // namespace structkv::rpc
