// Where a token's vectors lie, dense or in blocks.
#pragma once

#include <cstdint>

#include "kernels/cuda/host_device.h"

namespace structkv::cuda {

// From head 0's first vector to its vector of `token`, in the strides' unit. block_tokens 0: dense;
// null table: blocks in order. See TensorView of kernels/tensor.h.
STRUCTKV_HOST_DEVICE inline int64_t TokenOffset(int token, int64_t token_stride, int block_tokens,
                                                int64_t block_stride, const int32_t* block_table) {
  if (block_tokens == 0) return token * token_stride;
  const int block = token / block_tokens;
  const int64_t stored = block_table != nullptr ? block_table[block] : block;
  return stored * block_stride + token % block_tokens * token_stride;
}

}  // namespace structkv::cuda
