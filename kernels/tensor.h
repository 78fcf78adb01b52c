// Element types, layouts and non-owning views of keys, values and queries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace structkv {

// Element types of keys, values and queries. Storage is little-endian. The 8-bit ones are those of
// the OCP specification "OFP8": e4m3 has bias 7, no infinities and one NaN per sign (0x7F, 0xFF);
// e5m2 is the upper half of a float16, with infinities and NaN.
enum class DType : uint8_t { kF32, kF16, kBF16, kF8E4M3, kF8E5M2 };

constexpr bool IsFp8(DType dtype) { return dtype == DType::kF8E4M3 || dtype == DType::kF8E5M2; }

// Bytes of one element.
constexpr size_t DTypeSize(DType dtype) {
  if (IsFp8(dtype)) return 1;
  return dtype == DType::kF32 ? 4 : 2;
}

constexpr std::string_view DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kF16:
      return "f16";
    case DType::kBF16:
      return "bf16";
    case DType::kF8E4M3:
      return "f8_e4m3";
    case DType::kF8E5M2:
      return "f8_e5m2";
  }
  return "?";
}

// Order of axes of keys and values; the last axis is contiguous.
enum class Layout : uint8_t {
  kHeadTokenDim,  // [kv_head, token, dim]
  kTokenHeadDim,  // [token, kv_head, dim]
};

constexpr std::string_view LayoutName(Layout layout) {
  return layout == Layout::kHeadTokenDim ? "head_token_dim" : "token_head_dim";
}

// A read-only view of [heads, tokens, dim] vectors in either layout, dense or paged. Owns nothing.
// The innermost axis is contiguous; strides count elements. `data` needs no more alignment than its
// bytes have.
//
// Paged: block_tokens is not 0. Token t lies in block t / block_tokens of the sequence, at place
// t % block_tokens, and the sequence's block b is the pool's block block_table[b], or b where the
// table is null. head_stride and token_stride are those within a block.
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t heads = 0;
  int64_t tokens = 0;
  int64_t dim = 0;
  int64_t head_stride = 0;
  int64_t token_stride = 0;

  const int32_t* block_table = nullptr;  // [ceil(tokens / block_tokens)], host; null: in order
  int64_t block_tokens = 0;              // 0: dense
  int64_t block_stride = 0;

  // A dense tensor in `layout`.
  static constexpr TensorView Dense(const void* data, DType dtype, Layout layout, int64_t heads,
                                    int64_t tokens, int64_t dim) {
    const bool head_first = layout == Layout::kHeadTokenDim;
    return {data,
            dtype,
            heads,
            tokens,
            dim,
            head_first ? tokens * dim : dim,
            head_first ? dim : heads * dim};
  }

  // A pool of dense blocks, each in `layout`: [block, head, token, dim] or [block, token, head,
  // dim]. Null table: the sequence's blocks in order.
  static constexpr TensorView Paged(const void* data, DType dtype, Layout layout, int64_t heads,
                                    int64_t tokens, int64_t dim, const int32_t* block_table,
                                    int64_t block_tokens) {
    TensorView view = Dense(data, dtype, layout, heads, block_tokens, dim);
    view.tokens = tokens;
    view.block_table = block_table;
    view.block_tokens = block_tokens;
    view.block_stride = heads * block_tokens * dim;
    return view;
  }

  bool paged() const { return block_tokens != 0; }

  // Elements from `data` to the vector of `token` in head 0.
  int64_t TokenOffset(int64_t token) const {
    if (!paged()) return token * token_stride;
    const int64_t block = token / block_tokens;
    return (block_table != nullptr ? block_table[block] : block) * block_stride +
           token % block_tokens * token_stride;
  }

  // The vector of `token` in `head`: `dim` contiguous elements.
  const std::byte* Row(int64_t head, int64_t token) const {
    return static_cast<const std::byte*>(data) +
           (head * head_stride + TokenOffset(token)) * static_cast<int64_t>(DTypeSize(dtype));
  }
};

// The writable twin of TensorView. Paged, its blocks lie in order.
struct MutableTensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t heads = 0;
  int64_t tokens = 0;
  int64_t dim = 0;
  int64_t head_stride = 0;
  int64_t token_stride = 0;

  int64_t block_tokens = 0;  // 0: dense
  int64_t block_stride = 0;

  static constexpr MutableTensorView Dense(void* data, DType dtype, Layout layout, int64_t heads,
                                           int64_t tokens, int64_t dim) {
    const TensorView v = TensorView::Dense(nullptr, dtype, layout, heads, tokens, dim);
    return {data, dtype, heads, tokens, dim, v.head_stride, v.token_stride};
  }

  // As TensorView::Paged. The caller zeroes what is left of the last block.
  static constexpr MutableTensorView Paged(void* data, DType dtype, Layout layout, int64_t heads,
                                           int64_t tokens, int64_t dim, int64_t block_tokens) {
    const TensorView v =
        TensorView::Paged(nullptr, dtype, layout, heads, tokens, dim, nullptr, block_tokens);
    return {data,          dtype,          heads,          tokens,        dim,
            v.head_stride, v.token_stride, v.block_tokens, v.block_stride};
  }

  bool paged() const { return block_tokens != 0; }

  std::byte* Row(int64_t head, int64_t token) const {
    int64_t offset = head * head_stride;
    if (paged()) {
      offset += token / block_tokens * block_stride + token % block_tokens * token_stride;
    } else {
      offset += token * token_stride;
    }
    return static_cast<std::byte*>(data) + offset * static_cast<int64_t>(DTypeSize(dtype));
  }
};

}  // namespace structkv
