// Copies of dense tensors in blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/tensor.h"

namespace structkv::testing {

// A dense tensor's vectors in a pool of blocks that lie in any order, with others between them.
// What belongs to no token is NaN.
class PagedTensor {
 public:
  // Axes within a block are in `layout`.
  PagedTensor(const TensorView& dense, Layout layout, int64_t block_tokens,
              std::mt19937_64& random);

  TensorView view() const { return view_; }

 private:
  std::vector<int32_t> table_;
  std::vector<std::byte> pool_;
  TensorView view_;
};

}  // namespace structkv::testing
