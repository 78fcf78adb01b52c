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

// Normally distributed values, [heads, tokens, kDim] in the layout, in a buffer as a server has it.
class Tensor {
 public:
  Tensor(DType dtype, int64_t heads, int64_t tokens, Layout layout = Layout::kHeadTokenDim);

  TensorView view() const;
  MutableTensorView mutable_view();
  const std::byte* data() const { return data_.data(); }
  std::byte* data() { return data_.data(); }
  int64_t bytes() const { return static_cast<int64_t>(data_.size()); }

 private:
  DType dtype_;
  Layout layout_;
  int64_t heads_;
  int64_t tokens_;
  engine::Buffer data_;
};

// Scores as attention makes them: a few large, most small, all different.
std::vector<float> SaliencyLike(int64_t tokens, uint32_t seed = 7);

double Seconds(absl::FunctionRef<void()> work);

}  // namespace structkv::bench
