#include "tests/kernels/paged_tensor.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace structkv::testing {

PagedTensor::PagedTensor(const TensorView& dense, Layout layout, int64_t block_tokens,
                         std::mt19937_64& random) {
  const int64_t blocks = (dense.tokens + block_tokens - 1) / block_tokens;
  const int64_t pool_blocks = blocks + blocks / 2 + 1;
  table_.resize(static_cast<size_t>(pool_blocks));
  std::iota(table_.begin(), table_.end(), 0);
  std::shuffle(table_.begin(), table_.end(), random);
  table_.resize(static_cast<size_t>(blocks));
  const auto element = DTypeSize(dense.dtype);
  const auto block_bytes = static_cast<size_t>(dense.heads * block_tokens * dense.dim) * element;
  // All ones are a NaN of every type.
  pool_.assign(static_cast<size_t>(pool_blocks) * block_bytes, std::byte{0xFF});
  view_ = TensorView::Paged(pool_.data(), dense.dtype, layout, dense.heads, dense.tokens, dense.dim,
                            table_.data(), block_tokens);
  const bool head_first = layout == Layout::kHeadTokenDim;
  for (int64_t h = 0; h < dense.heads; ++h) {
    for (int64_t j = 0; j < dense.tokens; ++j) {
      // [block, head, place, dim] or [block, place, head, dim]
      const int64_t block = table_[static_cast<size_t>(j / block_tokens)];
      const int64_t place = j % block_tokens;
      const int64_t row = head_first ? (block * dense.heads + h) * block_tokens + place
                                     : (block * block_tokens + place) * dense.heads + h;
      std::memcpy(pool_.data() + static_cast<size_t>(row * dense.dim) * element, dense.Row(h, j),
                  static_cast<size_t>(dense.dim) * element);
    }
  }
}

}  // namespace structkv::testing
