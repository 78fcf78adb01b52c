#include "service/rpc/fetch_builder.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "service/rpc/message_room.h"
#include "service/rpc/open_decoder.h"
#include "service/rpc/rotary_codec.h"
#include "structkv/v1/piece_codec.h"

namespace structkv::rpc {
namespace {

bool IsRows(const session::SlicedTensor& tensor) {
  return tensor.tensor == engine::InputTensor::kKeys ||
         tensor.tensor == engine::InputTensor::kValues;
}

void SetRange(const engine::HeadRange& range, v1::HeadRange* out) {
  out->set_begin(static_cast<uint32_t>(range.begin));
  out->set_count(static_cast<uint32_t>(range.count));
}

}  // namespace

v1::CacheInfo EncodeInfo(const session::HeldSlice& slice) {
  const session::HeldCache& cache = *slice.cache();
  const engine::PromptSpec& spec = cache.spec;
  v1::CacheInfo info;
  v1::ModelGeometry* geometry = info.mutable_geometry();
  geometry->set_layer_count(static_cast<uint32_t>(spec.geometry.layers));
  geometry->set_query_head_count(static_cast<uint32_t>(spec.geometry.query_heads));
  geometry->set_kv_head_count(static_cast<uint32_t>(spec.geometry.kv_heads));
  geometry->set_key_dim(static_cast<uint32_t>(spec.geometry.key_dim));
  geometry->set_value_dim(static_cast<uint32_t>(spec.geometry.value_dim));
  geometry->set_values_in_keys(spec.geometry.values_in_keys);
  SetRange(cache.kv_heads, info.mutable_held_kv_heads());
  SetRange(slice.kv_heads(), info.mutable_kv_heads());
  info.set_first_layer(static_cast<uint32_t>(slice.first_layer()));
  info.set_layer_count(static_cast<uint32_t>(slice.end_layer() - slice.first_layer()));
  info.set_dtype(EncodeDType(spec.dtype));
  info.set_layout(spec.layout == Layout::kHeadTokenDim ? v1::LAYOUT_HEAD_TOKEN_DIM
                                                       : v1::LAYOUT_TOKEN_HEAD_DIM);
  if (spec.paged.has_value()) {
    info.set_block_tokens(static_cast<uint32_t>(spec.paged->block_tokens));
  }
  info.set_kv_scales(EncodeKvScales(spec.kv_scales));
  info.set_granularity(spec.per_kv_head() ? v1::GRANULARITY_PER_KV_HEAD
                                          : v1::GRANULARITY_PER_LAYER);
  info.set_logical_length(static_cast<uint32_t>(spec.prompt_tokens));
  info.set_kv_length(static_cast<uint32_t>(spec.largest_kept_tokens()));
  info.set_next_position(static_cast<uint32_t>(spec.next_position()));
  info.set_kv_blocks(static_cast<uint32_t>(spec.kv_blocks()));
  for (int64_t layer = slice.first_layer(); layer < slice.end_layer(); ++layer) {
    info.add_kept_tokens(
        static_cast<uint32_t>(cache.layers[static_cast<size_t>(layer)].kept_tokens));
    info.add_layer_bytes(static_cast<uint64_t>(slice.LayerBytes(layer)));
  }
  info.set_total_bytes(static_cast<uint64_t>(slice.total_bytes()));
  info.set_fingerprint(engine::Fingerprint(spec));
  *info.mutable_method() = EncodeMethod(spec.method);
  info.set_statistic(EncodeStatistic(spec.statistic));
  if (spec.rotary.has_value()) *info.mutable_rotary() = EncodeRotary(*spec.rotary);
  info.set_model_id(spec.model_id);
  if (spec.attention_scale.has_value()) info.set_attention_scale(*spec.attention_scale);
  return info;
}

FetchBuilder::FetchBuilder(session::HeldSlice slice, const Options& options,
                           engine::BufferPool* buffers, const Backend* backend)
    : slice_(std::move(slice)),
      options_(options),
      buffers_(buffers),
      backend_(backend),
      layer_(slice_.first_layer()) {
  if (options_.info_only) {
    layer_ = slice_.end_layer();
  } else {
    Skip(options_.skip_bytes);
  }
  StartLayer();
}

void FetchBuilder::StartLayer() {
  room_ = engine::LayerInput();
  room_.layer = layer_ - slice_.first_layer();
  staged_tensor_ = tensor_;
  staged_bytes_ = offset_;
  staged_ = transport().transfers() == nullptr;
  if (staged_ && layer_ < slice_.end_layer()) transport().GiveRoom(&room_);
}

const engine::Buffer& FetchBuilder::RoomOf(const session::SlicedTensor& tensor) const {
  static const auto* const none = new engine::Buffer();
  if (!IsRows(tensor)) return *none;
  return tensor.tensor == engine::InputTensor::kKeys ? room_.key_room : room_.value_room;
}

absl::Status FetchBuilder::Put(const session::SlicedTensor& tensor, int64_t offset,
                               int64_t bytes) const {
  return backend_->Fill(RoomOf(tensor).data() + offset, bytes,
                        [&](int64_t done, absl::Span<std::byte> run) {
                          session::CopyOut(tensor, offset + done, run);
                        });
}

void FetchBuilder::Skip(int64_t bytes) {
  for (; layer_ < slice_.end_layer(); ++layer_) {
    const std::vector<session::SlicedTensor> tensors = slice_.Tensors(layer_);
    for (tensor_ = 0; tensor_ < tensors.size(); ++tensor_) {
      if (bytes < tensors[tensor_].size()) {
        offset_ = bytes;
        return;
      }
      bytes -= tensors[tensor_].size();
    }
  }
}

absl::StatusOr<WriteStep> FetchBuilder::Next() {
  switch (state_) {
    case State::kInfo: {
      state_ = layer_ < slice_.end_layer() ? State::kLayers : State::kSummary;
      v1::FetchCacheResponse response;
      *response.mutable_info() = EncodeInfo(slice_);
      response.mutable_info()->set_transport(EncodeTransport(transport().kind()));
      response.mutable_info()->set_transport_reason(options_.granted.reason);
      return WriteStep{WriteStep::Kind::kWrite, wire::Encode(response)};
    }
    case State::kLayers:
      return staged_ ? NextLayer() : Stage();
    case State::kSummary:
      break;
  }
  if (sending_->load() > 0) return WriteStep{WriteStep::Kind::kWait, {}};
  return WriteStep{WriteStep::Kind::kWriteLast, Summary()};
}

absl::StatusOr<WriteStep> FetchBuilder::Stage() {
  if (sending_->load() == transport::Transfers::kMostSending) {
    return WriteStep{WriteStep::Kind::kWait, {}};
  }
  if (absl::Status whole = transport().Check(); !whole.ok()) return whole;
  if (room_.key_room.empty()) transport().GiveRoom(&room_);
  const std::vector<session::SlicedTensor> tensors = slice_.Tensors(layer_);
  while (staged_tensor_ < tensors.size() && !IsRows(tensors[staged_tensor_])) {
    ++staged_tensor_;
    staged_bytes_ = 0;
  }
  staged_ = staged_tensor_ == tensors.size();
  if (staged_) return WriteStep{WriteStep::Kind::kAgain, {}};
  const session::SlicedTensor& tensor = tensors[staged_tensor_];
  const int64_t bytes = std::min(options_.max_message_bytes, tensor.size() - staged_bytes_);
  if (absl::Status put = Put(tensor, staged_bytes_, bytes); !put.ok()) return put;
  staged_bytes_ += bytes;
  if (staged_bytes_ == tensor.size()) {
    ++staged_tensor_;
    staged_bytes_ = 0;
  }
  return WriteStep{WriteStep::Kind::kAgain, {}};
}

void FetchBuilder::Send() {
  if (rows_.keys.empty() && rows_.values.empty()) return;
  rows_.layer = layer_;
  sending_->fetch_add(1);
  transport().transfers()->Send(
      rows_, [sending = sending_, told = options_.on_transfer](const absl::Status& status) {
        // A failure ends the stream, and its memory may still be NCCL's.
        if (status.ok()) sending->fetch_sub(1);
        told(status);
      });
  rows_ = engine::LayerOutput();
}

absl::StatusOr<wire::OutgoingPiece> FetchBuilder::Piece(const session::SlicedTensor& tensor,
                                                        int64_t bytes) {
  wire::OutgoingPiece piece;
  piece.layer = static_cast<uint32_t>(layer_);
  piece.tensor = EncodeTensor(tensor.tensor);
  piece.offset_bytes = static_cast<uint64_t>(offset_);
  const auto size = static_cast<size_t>(bytes);
  if (const engine::Buffer& room = RoomOf(tensor); !room.empty()) {
    std::byte* const to = room.data() + offset_;
    const transport::ResultSource source = transport().result_place().SourceOf(layer_, {to, size});
    if (const auto* transfer = std::get_if<transport::PairTransfer>(&source)) {
      piece.transfer = wire::Transfer{transfer->key, transfer->size_bytes};
      const bool keys = tensor.tensor == engine::InputTensor::kKeys;
      (keys ? rows_.keys : rows_.values) = engine::Buffer::Lent(to, size, room.owner());
      return piece;
    }
    if (absl::Status put = Put(tensor, offset_, bytes); !put.ok()) return put;
    const auto& range = std::get<transport::RegionRange>(source);
    piece.range = wire::Range{range.region, range.offset_bytes, range.size_bytes};
    return piece;
  }
  if (tensor.contiguous()) {
    piece.data = {tensor.data + offset_, size};
    piece.owner = slice_.cache();
  } else {
    auto buffer = std::make_shared<engine::Buffer>(buffers_->Acquire(size));
    session::CopyOut(tensor, offset_, buffer->span());
    piece.data = buffer->span();
    piece.owner = std::move(buffer);
  }
  if (options_.checksums) piece.xxh3_64 = wire::Checksum({&piece.data, 1});
  return piece;
}

absl::StatusOr<WriteStep> FetchBuilder::NextLayer() {
  const engine::LayerOutput& output = slice_.cache()->layers[static_cast<size_t>(layer_)];
  v1::LayerResult header;
  header.set_layer(static_cast<uint32_t>(layer_));
  header.set_kept_tokens(static_cast<uint32_t>(output.kept_tokens));
  header.set_kept_blocks(static_cast<uint32_t>(output.kept_blocks));
  if (!layer_begun_ && output.metrics.has_value()) {
    *header.mutable_metrics() = EncodeMetrics(layer_, *output.metrics);
  }
  layer_begun_ = true;

  const std::vector<session::SlicedTensor> tensors = slice_.Tensors(layer_);
  const bool by_transfers = transport().transfers() != nullptr;
  const size_t key_bytes = transport().result_place().TransferKey(layer_).size();
  MessageRoom room(options_.max_message_bytes, header);
  std::vector<wire::OutgoingPiece> pieces;
  while (tensor_ < tensors.size()) {
    const session::SlicedTensor& tensor = tensors[tensor_];
    // What goes to a region is cut alike: nothing else of the stream is looked at while it is
    // copied. A transfer is one buffer of each tensor.
    int64_t take = tensor.size() - offset_;
    if (by_transfers && IsRows(tensor)) {
      if (!room.TakeElsewhere(key_bytes)) break;
    } else {
      take = room.Take(take);
    }
    if (take == 0) break;
    absl::StatusOr<wire::OutgoingPiece> piece = Piece(tensor, take);
    if (!piece.ok()) return piece.status();
    pieces.push_back(*std::move(piece));
    sent_bytes_ += take;
    offset_ += take;
    if (offset_ < tensor.size()) break;  // the message is full
    ++tensor_;
    offset_ = 0;
  }
  if (absl::Status whole = transport().Check(); !whole.ok()) return whole;
  if (tensor_ == tensors.size()) {
    if (by_transfers) Send();
    header.set_complete(true);
    layer_begun_ = false;
    tensor_ = 0;
    if (++layer_ == slice_.end_layer()) state_ = State::kSummary;
    StartLayer();
  }
  return WriteStep{WriteStep::Kind::kWrite, wire::EncodeFetchedLayer(header, pieces)};
}

grpc::ByteBuffer FetchBuilder::Summary() const {
  v1::FetchCacheResponse response;
  v1::FetchSummary* summary = response.mutable_summary();
  summary->set_total_bytes(static_cast<uint64_t>(slice_.total_bytes()));
  summary->set_sent_bytes(static_cast<uint64_t>(sent_bytes_));
  summary->set_transport(std::string(transport::KindName(transport().kind())));
  return wire::Encode(response);
}

}  // namespace structkv::rpc
