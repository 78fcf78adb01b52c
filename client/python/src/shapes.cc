#include "shapes.h"

#include "structkv/sizes.h"

namespace structkv::python {
namespace {

// Keys or values of `tokens`, in `blocks` where they are paged.
Shape KvShape(const v1::Open& open, v1::Tensor tensor, int64_t tokens, int64_t blocks) {
  const v1::ModelGeometry& geometry = open.geometry();
  const int64_t heads = client::KvHeads(open);
  const int64_t dim = tensor == v1::TENSOR_KEYS || geometry.value_dim() == 0 ? geometry.key_dim()
                                                                             : geometry.value_dim();
  if (open.has_paged()) tokens = open.paged().block_tokens();
  Shape shape = {heads, tokens, dim};
  if (open.layout() == v1::LAYOUT_TOKEN_HEAD_DIM) shape = {tokens, heads, dim};
  if (open.has_paged()) shape.insert(shape.begin(), blocks);
  return shape;
}

Shape PerHead(const v1::Open& open, bool per_head, int64_t tokens) {
  if (per_head) return {client::KvHeads(open), tokens};
  return {tokens};
}

}  // namespace

const Element& ElementOf(const v1::Open& open, v1::Tensor tensor) {
  switch (tensor) {
    case v1::TENSOR_KEYS:
    case v1::TENSOR_VALUES:
      return ElementOf(open.dtype());
    case v1::TENSOR_WINDOW_QUERIES:
      return ElementOf(client::QueryDType(open));
    case v1::TENSOR_POSITIONS:
    case v1::TENSOR_SKELETON_POSITIONS:
      return Int32();
    default:
      return Float32();
  }
}

Shape InputShape(const v1::Open& open, const v1::Opened& opened, v1::Tensor tensor, uint32_t tokens,
                 bool whole) {
  switch (tensor) {
    case v1::TENSOR_KEYS:
    case v1::TENSOR_VALUES:
      return KvShape(open, tensor, tokens,
                     whole ? open.paged().block_count() : client::KeptBlocks(open, tokens));
    case v1::TENSOR_WINDOW_QUERIES:
      return {client::QueryHeads(open), opened.window_tokens(), open.geometry().key_dim()};
    case v1::TENSOR_WINDOW_LSE:
      return {client::QueryHeads(open), opened.window_tokens()};
    case v1::TENSOR_SALIENCY:
      return PerHead(open, opened.statistic() == v1::STATISTIC_SALIENCY_PER_KV_HEAD, tokens);
    case v1::TENSOR_KEY_SCALES:
    case v1::TENSOR_VALUE_SCALES:
      return {open.kv_scales() == v1::KV_SCALES_PER_KV_HEAD ? client::KvHeads(open) : 1};
    default:
      return {tokens};
  }
}

Shape OutputShape(const v1::Open& open, const v1::Opened& opened, v1::Tensor tensor,
                  uint32_t kept) {
  const bool per_head =
      client::EffectiveGranularity(opened.method()) == v1::GRANULARITY_PER_KV_HEAD;
  switch (tensor) {
    case v1::TENSOR_POSITIONS:
    case v1::TENSOR_SALIENCY:
      return PerHead(open, per_head, kept);
    default:
      return InputShape(open, opened, tensor, kept, /*whole=*/false);
  }
}

}  // namespace structkv::python
