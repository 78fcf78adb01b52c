// Element types, layouts and non-owning views of keys, values and queries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace structkv {

// Element types of keys, values and queries. Storage is little-endian.
enum class DType : uint8_t { kF32, kF16, kBF16 };

// Bytes of one element.
constexpr size_t DTypeSize(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

constexpr std::string_view DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kF16:
      return "f16";
    case DType::kBF16:
      return "bf16";
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

// A read-only view of [heads, tokens, dim] vectors in either layout. Owns nothing. The innermost
// axis is contiguous; strides count elements. `data` needs no more alignment than its bytes have.
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t heads = 0;
  int64_t tokens = 0;
  int64_t dim = 0;
  int64_t head_stride = 0;
  int64_t token_stride = 0;

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

  // The vector of `token` in `head`: `dim` contiguous elements.
  const std::byte* Row(int64_t head, int64_t token) const {
    return static_cast<const std::byte*>(data) +
           (head * head_stride + token * token_stride) * static_cast<int64_t>(DTypeSize(dtype));
  }
};

// The writable twin of TensorView.
struct MutableTensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t heads = 0;
  int64_t tokens = 0;
  int64_t dim = 0;
  int64_t head_stride = 0;
  int64_t token_stride = 0;

  static constexpr MutableTensorView Dense(void* data, DType dtype, Layout layout, int64_t heads,
                                           int64_t tokens, int64_t dim) {
    const TensorView v = TensorView::Dense(nullptr, dtype, layout, heads, tokens, dim);
    return {data, dtype, heads, tokens, dim, v.head_stride, v.token_stride};
  }

  std::byte* Row(int64_t head, int64_t token) const {
    return static_cast<std::byte*>(data) +
           (head * head_stride + token * token_stride) * static_cast<int64_t>(DTypeSize(dtype));
  }
};

}  // namespace structkv
