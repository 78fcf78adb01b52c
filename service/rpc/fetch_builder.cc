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
  if (layer_ < slice_.end_layer()) transport().GiveRoom(&room_);
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

absl::StatusOr<grpc::ByteBuffer> FetchBuilder::Next() {
  switch (state_) {
    case State::kInfo: {
      state_ = layer_ < slice_.end_layer() ? State::kLayers : State::kSummary;
      v1::FetchCacheResponse response;
      *response.mutable_info() = EncodeInfo(slice_);
      response.mutable_info()->set_transport(EncodeTransport(transport().kind()));
      response.mutable_info()->set_transport_reason(options_.granted.reason);
      return wire::Encode(response);
    }
    case State::kLayers:
      return NextLayer();
    case State::kSummary:
    case State::kDone:
      break;
  }
  state_ = State::kDone;
  return Summary();
}

absl::StatusOr<wire::OutgoingPiece> FetchBuilder::Piece(const session::SlicedTensor& tensor,
                                                        int64_t bytes) {
  wire::OutgoingPiece piece;
  piece.layer = static_cast<uint32_t>(layer_);
  piece.tensor = EncodeTensor(tensor.tensor);
  piece.offset_bytes = static_cast<uint64_t>(offset_);
  const auto size = static_cast<size_t>(bytes);
  const bool keys = tensor.tensor == engine::InputTensor::kKeys;
  const engine::Buffer& room = keys ? room_.key_room : room_.value_room;
  if (!room.empty() && (keys || tensor.tensor == engine::InputTensor::kValues)) {
    std::byte* const to = room.data() + offset_;
    const absl::Status written =
        backend_->Fill(to, bytes, [&](int64_t done, absl::Span<std::byte> run) {
          session::CopyOut(tensor, offset_ + done, run);
        });
    if (!written.ok()) return written;
    const auto range =
        std::get<transport::RegionRange>(transport().result_place().SourceOf(layer_, {to, size}));
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

absl::StatusOr<grpc::ByteBuffer> FetchBuilder::NextLayer() {
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
  MessageRoom room(options_.max_message_bytes, header);
  std::vector<wire::OutgoingPiece> pieces;
  while (tensor_ < tensors.size()) {
    const session::SlicedTensor& tensor = tensors[tensor_];
    // What goes elsewhere is cut alike: nothing else of the stream is looked at while it is copied.
    const int64_t take = room.Take(tensor.size() - offset_);
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
    header.set_complete(true);
    layer_begun_ = false;
    tensor_ = 0;
    if (++layer_ == slice_.end_layer()) state_ = State::kSummary;
    StartLayer();
  }
  return wire::EncodeFetchedLayer(header, pieces);
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
