// A view's vectors as runs of bytes that lie one after the other, for copies to and from a dense
// tensor.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"

namespace structkv::cuda {

// The order of axes in which a view has the longest runs.
inline Layout LayoutOf(int64_t heads, int64_t head_stride, int64_t token_stride) {
  return heads > 1 && head_stride < token_stride ? Layout::kTokenHeadDim : Layout::kHeadTokenDim;
}
inline Layout LayoutOf(const TensorView& view) {
  return LayoutOf(view.heads, view.head_stride, view.token_stride);
}
inline Layout LayoutOf(const MutableTensorView& view) {
  return LayoutOf(view.heads, view.head_stride, view.token_stride);
}

// Of a view's vectors, without what lies between them.
template <class View>
int64_t VectorBytes(const View& view) {
  return view.heads * view.tokens * view.dim * static_cast<int64_t>(DTypeSize(view.dtype));
}

// Entries of a view's block table; 0 where it has none.
inline int64_t TableBlocks(const TensorView& view) {
  if (!view.paged() || view.block_table == nullptr) return 0;
  return (view.tokens + view.block_tokens - 1) / view.block_tokens;
}

struct Run {
  const std::byte* data = nullptr;  // null: there are no more
  int64_t bytes = 0;
};

class TensorRuns {
 public:
  // Runs that make up a dense tensor in `layout`.
  TensorRuns(const TensorView& view, Layout layout)
      : view_(view),
        row_bytes_(view.dim * static_cast<int64_t>(DTypeSize(view.dtype))),
        head_first_(layout == Layout::kHeadTokenDim) {}

  Run Next() {
    if (head_ == view_.heads || token_ == view_.tokens) return {};
    const std::byte* const data = view_.Row(head_, token_);
    if (head_first_) {
      const int64_t rows = view_.token_stride == view_.dim ? TokensInBlock() : 1;
      token_ += rows;
      if (token_ == view_.tokens) {
        token_ = 0;
        ++head_;
      }
      return {data, rows * row_bytes_};
    }
    if (view_.head_stride == view_.dim) {
      const int64_t tokens = view_.token_stride == view_.heads * view_.dim ? TokensInBlock() : 1;
      token_ += tokens;
      return {data, tokens * view_.heads * row_bytes_};
    }
    if (++head_ == view_.heads) {
      head_ = 0;
      ++token_;
    }
    return {data, row_bytes_};
  }

 private:
  // From token_ on, up to the end of its block.
  int64_t TokensInBlock() const {
    const int64_t left = view_.tokens - token_;
    if (!view_.paged()) return left;
    return std::min(left, view_.block_tokens - token_ % view_.block_tokens);
  }

  const TensorView view_;
  const int64_t row_bytes_;
  const bool head_first_;
  int64_t head_ = 0;
  int64_t token_ = 0;
};

}  // namespace structkv::cuda
