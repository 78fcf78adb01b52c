// Inputs of saliency calls, and what the oracle makes of them.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "kernels/backend.h"
#include "tests/kernels/random_tensor.h"

namespace structkv::testing {

struct Shape {
  int64_t query_heads;
  int64_t kv_heads;
  int64_t tokens;
  int64_t dim;
  int64_t window;
};

// Types of a call's queries and keys.
struct Types {
  DType queries;
  DType keys;
};

// Of the elements of 8-bit keys; of all others it is 1.
inline constexpr float kFp8Deviation = 20.0F;

// Random queries and keys; the views point into it.
struct Inputs {
  Inputs(const Shape& shape, DType dtype, Layout layout, std::mt19937_64& random,
         int64_t misalign = 0)
      : Inputs(shape, Types{dtype, dtype}, layout, random, misalign) {}

  // 8-bit keys spread over many of their codes, with a scale for each head.
  Inputs(const Shape& shape, const Types& types, Layout layout, std::mt19937_64& random,
         int64_t misalign = 0);

  SaliencyParams params() const {
    return {.queries = queries.view(),
            .keys = keys.view(),
            .key_scales = key_scales.empty() ? nullptr : key_scales.data()};
  }

  Tensor queries;
  Tensor keys;
  std::vector<float> key_scales;  // [kv_heads], or empty
};

// The largest of the window's rows, for each query head of the first KV head.
SaliencyParams WindowMaxOf(const SaliencyParams& params);

std::vector<float> Expected(const SaliencyParams& params);

// Log-sum-exp of every row, from the oracle. Dense keys.
std::vector<float> RowLse(const SaliencyParams& params);

// Fails where a saliency is further from the expected one than float32 explains, or `half` weights.
void ExpectNear(const std::vector<float>& actual, const std::vector<float>& expected,
                const SaliencyParams& params, bool half);

// As far as the backend says.
void ExpectNear(const Backend& backend, const std::vector<float>& actual,
                const std::vector<float>& expected, const SaliencyParams& params);

}  // namespace structkv::testing
