// Tensors and scores for benchmarks of one layer of Llama-3.1-8B.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/tensor.h"
#include "service/engine/buffer_pool.h"

namespace structkv::bench {

inline constexpr int64_t kQueryHeads = 32;
inline constexpr int64_t kKvHeads = 8;
inline constexpr int64_t kDim = 128;

// Normally distributed values, [heads, tokens, dim] in the layout, in a buffer as a server has it.
class Tensor {
 public:
  Tensor(DType dtype, int64_t heads, int64_t tokens, Layout layout = Layout::kHeadTokenDim,
         int64_t dim = kDim);

  TensorView view() const;
  // The same bytes as a pool of blocks in the layout, of which `table` says the order.
  TensorView paged_view(const std::vector<int32_t>& table, int64_t block_tokens) const;
  MutableTensorView mutable_view();
  const std::byte* data() const { return data_.data(); }
  std::byte* data() { return data_.data(); }
  int64_t bytes() const { return static_cast<int64_t>(data_.size()); }

 private:
  DType dtype_;
  Layout layout_;
  int64_t heads_;
  int64_t tokens_;
  int64_t dim_;
  engine::Buffer data_;
};

// The blocks of so many tokens in random order.
std::vector<int32_t> ShuffledBlocks(int64_t tokens, int64_t block_tokens);

// Scores as attention makes them: a few large, most small, all different.
std::vector<float> SaliencyLike(int64_t tokens, uint32_t seed = 7);

double Seconds(absl::FunctionRef<void()> work);

}  // namespace structkv::bench
