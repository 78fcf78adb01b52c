#include "structkv/sizes.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace structkv::client {
namespace {

uint64_t Heads(const v1::Open& open, const v1::Opened& opened) {
  const bool per_head = EffectiveGranularity(opened.method()) == v1::GRANULARITY_PER_KV_HEAD;
  return per_head ? KvHeads(open) : 1;
}

v1::Granularity PerHeadUnlessPerLayer(v1::Granularity granularity) {
  return granularity == v1::GRANULARITY_PER_LAYER ? v1::GRANULARITY_PER_LAYER
                                                  : v1::GRANULARITY_PER_KV_HEAD;
}

uint64_t ValueDim(const v1::ModelGeometry& geometry) {
  return geometry.value_dim() == 0 ? geometry.key_dim() : geometry.value_dim();
}

// Tokens that keys and values of `tokens` in order take room for.
uint64_t Slots(const v1::Open& open, uint64_t tokens) {
  const uint64_t block = open.paged().block_tokens();
  return block == 0 ? tokens : (tokens + block - 1) / block * block;
}

uint64_t ScaleBytes(const v1::Open& open) {
  switch (open.kv_scales()) {
    case v1::KV_SCALES_PER_TENSOR:
      return sizeof(float);
    case v1::KV_SCALES_PER_KV_HEAD:
      return sizeof(float) * KvHeads(open);
    default:
      return 0;
  }
}

// Of a layer that has `tokens`, whose keys and values take the room of `slots`.
uint64_t InputBytes(const v1::Open& open, const v1::Opened& opened, v1::Tensor tensor,
                    uint64_t tokens, uint64_t slots) {
  bool required = false;
  for (int t : opened.required_tensors()) required |= t == tensor;
  if (!required) return 0;
  const v1::ModelGeometry& geometry = open.geometry();
  const uint64_t element = ElementBytes(open.dtype());
  switch (tensor) {
    case v1::TENSOR_KEYS:
      return element * KvHeads(open) * slots * geometry.key_dim();
    case v1::TENSOR_VALUES:
      return element * KvHeads(open) * slots * ValueDim(geometry);
    case v1::TENSOR_WINDOW_QUERIES:
      return ElementBytes(QueryDType(open)) * QueryHeads(open) * opened.window_tokens() *
             geometry.key_dim();
    case v1::TENSOR_WINDOW_LSE:
      return sizeof(float) * uint64_t{QueryHeads(open)} * opened.window_tokens();
    case v1::TENSOR_SALIENCY:
      return sizeof(float) * tokens *
             (opened.statistic() == v1::STATISTIC_SALIENCY_PER_KV_HEAD ? KvHeads(open) : 1);
    case v1::TENSOR_KEY_SCALES:
    case v1::TENSOR_VALUE_SCALES:
      return ScaleBytes(open);
    default:
      return 0;
  }
}

}  // namespace

uint64_t ElementBytes(v1::DType dtype) {
  switch (dtype) {
    case v1::DTYPE_F32:
      return 4;
    case v1::DTYPE_F16:
    case v1::DTYPE_BF16:
      return 2;
    case v1::DTYPE_F8_E4M3:
    case v1::DTYPE_F8_E5M2:
      return 1;
    default:
      return 0;
  }
}

v1::DType QueryDType(const v1::Open& open) {
  if (open.query_dtype() != v1::DTYPE_UNSPECIFIED) return open.query_dtype();
  return ElementBytes(open.dtype()) == 1 ? v1::DTYPE_BF16 : open.dtype();
}

uint32_t KvHeads(const v1::Open& open) {
  const uint32_t heads = open.geometry().kv_head_count();
  if (!open.has_shard_group()) return heads;
  const v1::ShardGroup& group = open.shard_group();
  if (group.has_kv_heads()) return group.kv_heads().count();
  // Its even share; more ranks than heads have one each.
  return std::max(1U, heads / std::max(1U, group.shard_count()));
}

uint32_t QueryHeads(const v1::Open& open) {
  const uint32_t heads = open.geometry().query_head_count();
  if (!open.has_shard_group()) return heads;
  const v1::ShardGroup& group = open.shard_group();
  if (group.has_query_heads()) return group.query_heads().count();
  return heads / std::max(1U, group.shard_count());
}

v1::Granularity EffectiveGranularity(const v1::Method& method) {
  switch (method.kind_case()) {
    case v1::Method::kStructkv:
      return method.structkv().granularity() == v1::GRANULARITY_PER_KV_HEAD
                 ? v1::GRANULARITY_PER_KV_HEAD
                 : v1::GRANULARITY_PER_LAYER;
    case v1::Method::kSnapkv:
      return PerHeadUnlessPerLayer(method.snapkv().granularity());
    case v1::Method::kPyramidkv:
      return PerHeadUnlessPerLayer(method.pyramidkv().granularity());
    case v1::Method::kFastkv:
      return PerHeadUnlessPerLayer(method.fastkv().granularity());
    case v1::Method::kH2O:
      return PerHeadUnlessPerLayer(method.h2o().granularity());
    default:
      return v1::GRANULARITY_PER_LAYER;
  }
}

uint32_t MostKeptTokens(const v1::Open& open) {
  // Beside the budget's share: a window, or sinks. Methods' own default to at most so many.
  constexpr uint64_t kDefaultAlways = 32;
  const v1::Method& method = open.method();
  double ratio = 0.1;
  uint64_t always = kDefaultAlways;
  const auto take = [&](const v1::Budget& budget, bool has_always, uint64_t given) {
    if (budget.has_ratio()) ratio = budget.ratio();
    if (has_always) always = given;
  };
  const auto take_windowed = [&](const auto& kind) {
    take(kind.kv_budget(), kind.has_window_tokens(), kind.window_tokens());
  };
  switch (method.kind_case()) {
    case v1::Method::kSnapkv:
      take_windowed(method.snapkv());
      break;
    case v1::Method::kPyramidkv:  // the first layer keeps up to twice the mean
      take_windowed(method.pyramidkv());
      ratio *= 2;
      break;
    case v1::Method::kFastkv:
      take_windowed(method.fastkv());
      break;
    case v1::Method::kGemfilter:
      take_windowed(method.gemfilter());
      break;
    case v1::Method::kStreamingLlm:
      take(method.streaming_llm().kv_budget(), method.streaming_llm().has_sink_tokens(),
           method.streaming_llm().sink_tokens());
      break;
    case v1::Method::kH2O:
      take(method.h2o().kv_budget(), false, 0);
      break;
    case v1::Method::kFull:
      return open.prompt_tokens();
    default:
      take_windowed(method.structkv());
  }
  // Roundings of the share, and of a pyramid's layers, are below 4. What is no ratio is refused.
  const double share = std::ceil(ratio * open.prompt_tokens()) + 4;
  const double most = open.prompt_tokens();
  return static_cast<uint32_t>(share >= 0 && share + static_cast<double>(always) < most
                                   ? share + static_cast<double>(always)
                                   : most);
}

uint32_t KeptBlocks(const v1::Open& open, uint32_t kept) {
  const uint64_t block = open.paged().block_tokens();
  if (block == 0 || open.output() == v1::OUTPUT_PLAN) return 0;
  return static_cast<uint32_t>(Slots(open, kept) / block);
}

uint64_t InputTensorBytes(const v1::Open& open, const v1::Opened& opened, v1::Tensor tensor) {
  const uint64_t pool = uint64_t{open.paged().block_count()} * open.paged().block_tokens();
  return InputBytes(open, opened, tensor, open.prompt_tokens(),
                    open.has_paged() ? pool : open.prompt_tokens());
}

uint64_t SkeletonTensorBytes(const v1::Open& open, const v1::Opened& opened, v1::Tensor tensor) {
  const uint64_t tokens = opened.skeleton_tokens();
  if (tensor == v1::TENSOR_POSITIONS) return sizeof(int32_t) * tokens;
  return InputBytes(open, opened, tensor, tokens, Slots(open, tokens));
}

uint64_t OutputTensorBytes(const v1::Open& open, const v1::Opened& opened, uint32_t layer,
                           v1::Tensor tensor) {
  if (layer >= static_cast<uint32_t>(opened.kept_tokens_size())) return 0;
  return AnswerTensorBytes(open, opened, tensor, open.prompt_tokens(),
                           opened.kept_tokens(static_cast<int>(layer)));
}

uint64_t AnswerTensorBytes(const v1::Open& open, const v1::Opened& opened, v1::Tensor tensor,
                           uint32_t tokens, uint32_t kept) {
  const v1::ModelGeometry& geometry = open.geometry();
  const uint64_t row = ElementBytes(open.dtype()) * KvHeads(open) * Slots(open, kept);
  // Rows stay with a plan, and with a hold.
  const bool no_rows = open.output() == v1::OUTPUT_PLAN || open.output() == v1::OUTPUT_HOLD;
  switch (tensor) {
    case v1::TENSOR_POSITIONS:
      return sizeof(int32_t) * Heads(open, opened) * kept;
    case v1::TENSOR_KEYS:
      return no_rows ? 0 : row * geometry.key_dim();
    case v1::TENSOR_VALUES:
      return no_rows || geometry.values_in_keys() ? 0 : row * ValueDim(geometry);
    case v1::TENSOR_KEY_SCALES:
      return no_rows || kept == 0 ? 0 : ScaleBytes(open);
    case v1::TENSOR_VALUE_SCALES:
      return no_rows || kept == 0 || geometry.values_in_keys() ? 0 : ScaleBytes(open);
    case v1::TENSOR_SALIENCY: {
      const bool scored = opened.statistic() != v1::STATISTIC_NONE;
      if (!open.return_saliency() || !scored || kept == 0) return 0;
      return sizeof(float) * Heads(open, opened) * tokens;
    }
    default:
      return 0;
  }
}

}  // namespace structkv::client
