// Tensors filled from a seed, in any element type, layout and alignment.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/tensor.h"

namespace structkv::testing {

// STRUCTKV_TEST_SEED, or a fixed one. Printed once per program.
uint64_t Seed();

// A generator for one test: the seed and the test's own number.
std::mt19937_64 Random(uint64_t number);

// The nearest value of `dtype`, ties to even, as its bits.
uint32_t Encode(float value, DType dtype);

// A dense tensor that owns its bytes.
class Tensor {
 public:
  // `misalign` bytes beyond a 64-byte boundary.
  Tensor(DType dtype, Layout layout, int64_t heads, int64_t tokens, int64_t dim,
         int64_t misalign = 0);

  // Normally distributed elements.
  void Fill(std::mt19937_64& random, float deviation = 1.0F);
  void Set(int64_t head, int64_t token, int64_t element, float value);
  TensorView view() const { return view_; }
  MutableTensorView mutable_view();

 private:
  std::vector<std::byte> bytes_;
  TensorView view_;
};

}  // namespace structkv::testing
