#include "service/rpc/open_decoder.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "service/rpc/method_codec.h"
#include "service/rpc/rotary_codec.h"

namespace structkv::rpc {
namespace {

absl::Status Invalid(absl::string_view field, absl::string_view value, absl::string_view allowed) {
  return absl::InvalidArgumentError(absl::StrCat("open.", field, " is ", value, "; ", allowed));
}

absl::StatusOr<DType> DecodeDType(absl::string_view field, v1::DType dtype) {
  switch (dtype) {
    case v1::DTYPE_F32:
      return DType::kF32;
    case v1::DTYPE_F16:
      return DType::kF16;
    case v1::DTYPE_BF16:
      return DType::kBF16;
    case v1::DTYPE_F8_E4M3:
      return DType::kF8E4M3;
    case v1::DTYPE_F8_E5M2:
      return DType::kF8E5M2;
    default:
      return Invalid(field, EnumText(dtype),
                     "allowed: DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_F8_E4M3, DTYPE_F8_E5M2");
  }
}

absl::StatusOr<engine::KvScales> DecodeKvScales(v1::KvScales scales) {
  switch (scales) {
    case v1::KV_SCALES_UNSPECIFIED:
    case v1::KV_SCALES_NONE:
      return engine::KvScales::kNone;
    case v1::KV_SCALES_PER_TENSOR:
      return engine::KvScales::kPerTensor;
    case v1::KV_SCALES_PER_KV_HEAD:
      return engine::KvScales::kPerKvHead;
    default:
      return Invalid("kv_scales", EnumText(scales),
                     "allowed: KV_SCALES_NONE, KV_SCALES_PER_TENSOR, KV_SCALES_PER_KV_HEAD");
  }
}

absl::StatusOr<Layout> DecodeLayout(v1::Layout layout) {
  switch (layout) {
    case v1::LAYOUT_HEAD_TOKEN_DIM:
      return Layout::kHeadTokenDim;
    case v1::LAYOUT_TOKEN_HEAD_DIM:
      return Layout::kTokenHeadDim;
    default:
      return Invalid("layout", EnumText(layout),
                     "allowed: LAYOUT_HEAD_TOKEN_DIM, LAYOUT_TOKEN_HEAD_DIM");
  }
}

absl::StatusOr<engine::Statistic> DecodeStatistic(v1::Statistic statistic,
                                                  const method::MethodSpec& method) {
  const bool needed = method.needs_statistics();
  engine::Statistic decoded = engine::Statistic::kNone;
  switch (statistic) {
    case v1::STATISTIC_UNSPECIFIED:
      if (method.method == method::Method::kH2o) return engine::Statistic::kSaliencyPerKvHead;
      return needed ? engine::Statistic::kWindowQueries : engine::Statistic::kNone;
    case v1::STATISTIC_NONE:
      break;
    case v1::STATISTIC_WINDOW_QUERIES:
      decoded = engine::Statistic::kWindowQueries;
      break;
    case v1::STATISTIC_SALIENCY:
      decoded = engine::Statistic::kSaliency;
      break;
    case v1::STATISTIC_SALIENCY_PER_KV_HEAD:
      decoded = engine::Statistic::kSaliencyPerKvHead;
      break;
    default:
      return Invalid("statistic", EnumText(statistic),
                     "allowed: STATISTIC_NONE, STATISTIC_WINDOW_QUERIES, STATISTIC_SALIENCY, "
                     "STATISTIC_SALIENCY_PER_KV_HEAD");
  }
  if ((decoded != engine::Statistic::kNone) != needed) {
    return Invalid("statistic", EnumText(statistic),
                   absl::StrCat("the method ", std::string(method::MethodName(method.method)),
                                needed ? " needs statistics" : " takes none"));
  }
  return decoded;
}

absl::StatusOr<engine::Pull> DecodePull(v1::Pull pull) {
  switch (pull) {
    case v1::PULL_UNSPECIFIED:
    case v1::PULL_NONE:
      return engine::Pull::kNone;
    case v1::PULL_VALUES:
      return engine::Pull::kValues;
    case v1::PULL_KEYS_AND_VALUES:
      return engine::Pull::kKeysAndValues;
    default:
      return Invalid("pull", EnumText(pull),
                     "allowed: PULL_NONE, PULL_VALUES, PULL_KEYS_AND_VALUES");
  }
}

engine::PagedLayout DecodePaged(const v1::PagedLayout& paged) {
  // The entries' range is for engine::ValidateSpec.
  return {.block_tokens = paged.block_tokens(),
          .block_count = paged.block_count(),
          .block_table = std::make_shared<const std::vector<int32_t>>(paged.block_table().begin(),
                                                                      paged.block_table().end())};
}

engine::ModelGeometry DecodeGeometry(const v1::ModelGeometry& geometry) {
  return {.layers = geometry.layer_count(),
          .query_heads = geometry.query_head_count(),
          .kv_heads = geometry.kv_head_count(),
          .key_dim = geometry.key_dim(),
          .value_dim = geometry.value_dim() == 0 ? geometry.key_dim() : geometry.value_dim(),
          .values_in_keys = geometry.values_in_keys()};
}

absl::Status DecodeShardGroup(const v1::ShardGroup& group, OpenRequest* request) {
  if (group.shard_count() == 0) {
    return Invalid("shard_group.shard_count", "0", "at least 1 is allowed");
  }
  if (group.has_kv_heads() != group.has_query_heads()) {
    return Invalid("shard_group", group.has_kv_heads() ? "kv_heads alone" : "query_heads alone",
                   "kv_heads and query_heads are set both or neither");
  }
  engine::ShardMember& member = request->shard.emplace();
  member.group_id = group.group_id();
  member.shard_count = group.shard_count();
  member.shard_index = group.shard_index();
  request->spec.decode_shards = group.decode_shard_count();
  const engine::ModelGeometry& geometry = request->spec.geometry;
  if (group.has_kv_heads()) {
    member.heads = {
        .kv_heads = {group.kv_heads().begin(), group.kv_heads().count()},
        .query_heads = {group.query_heads().begin(), group.query_heads().count()},
    };
  } else if (geometry.kv_heads > 0 && member.shard_index < member.shard_count) {
    // Others are refused before the heads are looked at.
    absl::StatusOr<engine::Shard> even =
        engine::EvenShard(geometry, member.shard_count, member.shard_index);
    if (!even.ok()) return even.status();
    member.heads = *even;
  }
  return absl::OkStatus();
}

absl::Status DecodeHold(const v1::Open& open, OpenRequest* request) {
  if (!request->hold) {
    if (!open.has_hold()) return absl::OkStatus();
    return Invalid(
        "hold", "set",
        absl::StrCat("it needs the output OUTPUT_HOLD, but that is ", EnumText(open.output())));
  }
  if (request->spec.method.method == method::Method::kGemFilter) {
    return Invalid("output", "OUTPUT_HOLD",
                   "gemfilter prefills again with the tokens it chose, so there is no cache to "
                   "hold; OUTPUT_PLAN is allowed");
  }
  if (open.shard_group().decode_shard_count() > 1) {
    return Invalid("shard_group.decode_shard_count",
                   absl::StrCat(open.shard_group().decode_shard_count()),
                   "with OUTPUT_HOLD 1 is allowed, as FetchCache takes any range of KV heads");
  }
  if (open.has_result_range()) {
    return Invalid("result_range", "set", "with OUTPUT_HOLD keys and values stay in the server");
  }
  if (open.hold().has_lease_millis()) request->lease_millis = open.hold().lease_millis();
  return absl::OkStatus();
}

absl::StatusOr<transport::Kind> DecodeTransport(v1::Transport transport) {
  switch (transport) {
    case v1::TRANSPORT_INLINE:
      return transport::Kind::kInline;
    case v1::TRANSPORT_SHARED_MEMORY:
      return transport::Kind::kSharedMemory;
    case v1::TRANSPORT_CUDA_IPC:
      return transport::Kind::kCudaIpc;
    case v1::TRANSPORT_NCCL:
      return transport::Kind::kNccl;
    default:
      return absl::InvalidArgumentError(
          "allowed: TRANSPORT_INLINE, TRANSPORT_SHARED_MEMORY, TRANSPORT_CUDA_IPC, TRANSPORT_NCCL");
  }
}

// `Message` has the fields of that name; its own is `request->message`.
template <class Message>
absl::Status DecodeTransportFields(const Message& message, transport::TransportRequest* request) {
  for (int i = 0; i < message.transports_size(); ++i) {
    const auto invalid = [&](absl::string_view allowed) {
      return absl::InvalidArgumentError(absl::StrCat(request->message, "transports[", i, "] is ",
                                                     EnumText(message.transports(i)), "; ",
                                                     allowed));
    };
    const absl::StatusOr<transport::Kind> kind = DecodeTransport(message.transports(i));
    if (!kind.ok()) return invalid(kind.status().message());
    if (std::count(request->wishes.begin(), request->wishes.end(), *kind) > 0) {
      return invalid("each is named once");
    }
    request->wishes.push_back(*kind);
  }
  request->regions.assign(message.regions().begin(), message.regions().end());
  if (message.has_result_range()) {
    const v1::RegionRange& range = message.result_range();
    request->results = {range.region(), range.offset_bytes(), range.size_bytes()};
  }
  request->nccl_pair = message.nccl_pair();
  return absl::OkStatus();
}

// What the wire limits beside the spec.
absl::Status DecodeRest(const v1::Open& open, int64_t max_message_bytes, OpenRequest* request) {
  if (open.idempotency_key().size() > kMaxIdempotencyKeyBytes) {
    return Invalid("idempotency_key", absl::StrCat(open.idempotency_key().size(), " bytes long"),
                   absl::StrCat("at most ", kMaxIdempotencyKeyBytes, " are allowed"));
  }
  if (open.model_id().size() > kMaxModelIdBytes) {
    return Invalid("model_id", absl::StrCat(open.model_id().size(), " bytes long"),
                   absl::StrCat("at most ", kMaxModelIdBytes, " are allowed"));
  }
  const int64_t layers = request->spec.geometry.layers;
  if (open.layers_in_flight() > layers) {
    return Invalid("layers_in_flight", absl::StrCat(open.layers_in_flight()),
                   absl::StrCat("1 to layer_count (", layers, ") are allowed"));
  }
  request->layers_in_flight =
      open.layers_in_flight() == 0 ? std::min<int64_t>(2, layers) : open.layers_in_flight();
  request->idempotency_key = open.idempotency_key();

  const int64_t longest = open.max_response_message_bytes();
  request->max_response_message_bytes =
      longest == 0 ? std::min(kDefaultMessageBytes, max_message_bytes) : longest;
  if (longest != 0 && (longest < kMinMessageBytes || longest > max_message_bytes)) {
    return Invalid("max_response_message_bytes", absl::StrCat(longest),
                   absl::StrCat(kMinMessageBytes, " to ", max_message_bytes, " are allowed"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<OpenRequest> DecodeOpen(const v1::Open& open, int64_t max_message_bytes) {
  OpenRequest request;
  engine::PromptSpec& spec = request.spec;
  if (!open.has_geometry()) return Invalid("geometry", "not set", "it is required");
  spec.geometry = DecodeGeometry(open.geometry());
  if (spec.geometry.layers == 0) {
    return Invalid("geometry.layer_count", "0", "at least 1 is allowed");
  }
  spec.prompt_tokens = open.prompt_tokens();
  spec.model_id = open.model_id();

  absl::StatusOr<DType> dtype = DecodeDType("dtype", open.dtype());
  if (!dtype.ok()) return dtype.status();
  spec.dtype = *dtype;
  if (open.query_dtype() != v1::DTYPE_UNSPECIFIED) {
    absl::StatusOr<DType> queries = DecodeDType("query_dtype", open.query_dtype());
    if (!queries.ok()) return queries.status();
    spec.query_dtype = *queries;
  }
  absl::StatusOr<engine::KvScales> scales = DecodeKvScales(open.kv_scales());
  if (!scales.ok()) return scales.status();
  spec.kv_scales = *scales;
  absl::StatusOr<Layout> layout = DecodeLayout(open.layout());
  if (!layout.ok()) return layout.status();
  spec.layout = *layout;
  if (open.has_paged()) spec.paged = DecodePaged(open.paged());
  if (open.has_attention_scale()) spec.attention_scale = open.attention_scale();

  absl::StatusOr<method::MethodSpec> method =
      DecodeMethod(open.method(), spec.geometry.layers, open.statistic());
  if (!method.ok()) return method.status();
  spec.method = *method;
  absl::StatusOr<engine::Statistic> statistic = DecodeStatistic(open.statistic(), spec.method);
  if (!statistic.ok()) return statistic.status();
  spec.statistic = *statistic;
  if (open.window_lse() && spec.statistic != engine::Statistic::kWindowQueries) {
    return Invalid("window_lse", "true", "it needs the statistic STATISTIC_WINDOW_QUERIES");
  }
  spec.window_lse = open.window_lse();

  switch (open.output()) {
    case v1::OUTPUT_UNSPECIFIED:
    case v1::OUTPUT_COMPACT:
      break;
    case v1::OUTPUT_PLAN:
      spec.plan_only = true;
      break;
    case v1::OUTPUT_HOLD:
      request.hold = true;
      request.spec.held = true;
      break;
    default:
      return Invalid("output", EnumText(open.output()),
                     "allowed: OUTPUT_COMPACT, OUTPUT_PLAN, OUTPUT_HOLD");
  }
  if (absl::Status hold = DecodeHold(open, &request); !hold.ok()) return hold;
  absl::StatusOr<engine::Pull> pull = DecodePull(open.pull());
  if (!pull.ok()) return pull.status();
  spec.pull = *pull;
  spec.return_saliency = open.return_saliency() && spec.method.needs_statistics();
  spec.return_centrality = open.return_centrality() && spec.method.has_centrality();
  if (open.has_rotary()) {
    absl::StatusOr<method::RotarySpec> rotary = DecodeRotary(open.rotary(), spec.geometry.key_dim);
    if (!rotary.ok()) return rotary.status();
    spec.rotary = *rotary;
  }
  if (open.has_shard_group()) {
    if (absl::Status shard = DecodeShardGroup(open.shard_group(), &request); !shard.ok()) {
      return shard;
    }
  }
  absl::Status transports = DecodeTransportFields(open, &request.transport);
  if (!transports.ok()) return transports;
  if (absl::Status rest = DecodeRest(open, max_message_bytes, &request); !rest.ok()) return rest;
  return request;
}

v1::Opened EncodeOpened(const engine::PromptSpec& spec) {
  v1::Opened opened;
  *opened.mutable_method() = EncodeMethod(spec.method);
  opened.mutable_kept_tokens()->Reserve(static_cast<int>(spec.geometry.layers));
  for (int64_t layer = 0; layer < spec.geometry.layers; ++layer) {
    opened.add_kept_tokens(static_cast<uint32_t>(spec.kept_tokens(layer)));
  }
  opened.set_skeleton_tokens(static_cast<uint32_t>(spec.skeleton_tokens()));
  for (engine::InputTensor tensor : spec.RequiredTensors()) {
    opened.add_required_tensors(EncodeTensor(tensor));
  }
  opened.set_window_tokens(static_cast<uint32_t>(spec.window_rows()));
  opened.set_statistic(EncodeStatistic(spec.statistic));
  opened.set_fingerprint(engine::Fingerprint(spec));
  if (spec.rotary.has_value()) *opened.mutable_rotary() = EncodeRotary(*spec.rotary);
  return opened;
}

v1::KvScales EncodeKvScales(engine::KvScales scales) {
  switch (scales) {
    case engine::KvScales::kNone:
      return v1::KV_SCALES_NONE;
    case engine::KvScales::kPerTensor:
      return v1::KV_SCALES_PER_TENSOR;
    case engine::KvScales::kPerKvHead:
      return v1::KV_SCALES_PER_KV_HEAD;
  }
  return v1::KV_SCALES_UNSPECIFIED;
}

v1::Statistic EncodeStatistic(engine::Statistic statistic) {
  switch (statistic) {
    case engine::Statistic::kNone:
      return v1::STATISTIC_NONE;
    case engine::Statistic::kWindowQueries:
      return v1::STATISTIC_WINDOW_QUERIES;
    case engine::Statistic::kSaliency:
      return v1::STATISTIC_SALIENCY;
    case engine::Statistic::kSaliencyPerKvHead:
      return v1::STATISTIC_SALIENCY_PER_KV_HEAD;
  }
  return v1::STATISTIC_UNSPECIFIED;
}

v1::LayerMetrics EncodeMetrics(int64_t layer, const method::LayerMetrics& metrics) {
  v1::LayerMetrics encoded;
  encoded.set_layer(static_cast<uint32_t>(layer));
  encoded.set_entropy(metrics.entropy);
  encoded.set_sparsity(metrics.sparsity);
  encoded.set_variance(metrics.variance);
  return encoded;
}

v1::PivotDecision EncodePivot(const method::PivotDecision& decision) {
  v1::PivotDecision encoded;
  encoded.set_pivot_layer(static_cast<uint32_t>(decision.pivot_layer));
  if (decision.transition_layer.has_value()) {
    encoded.set_transition_layer(static_cast<uint32_t>(*decision.transition_layer));
  }
  encoded.set_mode(EncodePivotMode(decision.mode));
  encoded.set_decided_at_layer(static_cast<uint32_t>(decision.decided_at_layer));
  if (decision.skeleton_from_layer.has_value()) {
    encoded.set_skeleton_from_layer(static_cast<uint32_t>(*decision.skeleton_from_layer));
  }
  encoded.set_profiled_prompts(static_cast<uint32_t>(decision.profiled_prompts));
  for (const method::LayerScore& score : decision.layers) {
    v1::LayerMetrics* layer = encoded.add_layers();
    *layer = EncodeMetrics(score.layer, score.metrics);
    if (score.transition.has_value()) layer->set_transition(*score.transition);
  }
  return encoded;
}

v1::DType EncodeDType(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return v1::DTYPE_F32;
    case DType::kF16:
      return v1::DTYPE_F16;
    case DType::kBF16:
      return v1::DTYPE_BF16;
    case DType::kF8E4M3:
      return v1::DTYPE_F8_E4M3;
    case DType::kF8E5M2:
      return v1::DTYPE_F8_E5M2;
  }
  return v1::DTYPE_UNSPECIFIED;
}

v1::Tensor EncodeTensor(engine::InputTensor tensor) {
  switch (tensor) {
    case engine::InputTensor::kKeys:
      return v1::TENSOR_KEYS;
    case engine::InputTensor::kValues:
      return v1::TENSOR_VALUES;
    case engine::InputTensor::kWindowQueries:
      return v1::TENSOR_WINDOW_QUERIES;
    case engine::InputTensor::kWindowLse:
      return v1::TENSOR_WINDOW_LSE;
    case engine::InputTensor::kSaliency:
      return v1::TENSOR_SALIENCY;
    case engine::InputTensor::kPositions:
      return v1::TENSOR_POSITIONS;
    case engine::InputTensor::kKeyScales:
      return v1::TENSOR_KEY_SCALES;
    case engine::InputTensor::kValueScales:
      return v1::TENSOR_VALUE_SCALES;
  }
  return v1::TENSOR_UNSPECIFIED;
}

absl::StatusOr<transport::TransportRequest> DecodeTransports(const v1::FetchCacheRequest& fetch) {
  transport::TransportRequest request;
  request.message.clear();
  if (absl::Status status = DecodeTransportFields(fetch, &request); !status.ok()) return status;
  return request;
}

v1::Transport EncodeTransport(transport::Kind kind) {
  switch (kind) {
    case transport::Kind::kInline:
      return v1::TRANSPORT_INLINE;
    case transport::Kind::kSharedMemory:
      return v1::TRANSPORT_SHARED_MEMORY;
    case transport::Kind::kCudaIpc:
      return v1::TRANSPORT_CUDA_IPC;
    case transport::Kind::kNccl:
      return v1::TRANSPORT_NCCL;
  }
  return v1::TRANSPORT_UNSPECIFIED;
}

std::optional<engine::InputTensor> DecodeTensor(int tensor) {
  switch (tensor) {
    case v1::TENSOR_KEYS:
      return engine::InputTensor::kKeys;
    case v1::TENSOR_VALUES:
      return engine::InputTensor::kValues;
    case v1::TENSOR_WINDOW_QUERIES:
      return engine::InputTensor::kWindowQueries;
    case v1::TENSOR_WINDOW_LSE:
      return engine::InputTensor::kWindowLse;
    case v1::TENSOR_SALIENCY:
      return engine::InputTensor::kSaliency;
    case v1::TENSOR_POSITIONS:
      return engine::InputTensor::kPositions;
    case v1::TENSOR_KEY_SCALES:
      return engine::InputTensor::kKeyScales;
    case v1::TENSOR_VALUE_SCALES:
      return engine::InputTensor::kValueScales;
    default:
      return std::nullopt;
  }
}

}  // namespace structkv::rpc
