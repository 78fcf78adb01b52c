#include "tests/kernels/saliency_inputs.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/reference/reference_backend.h"
#include "tests/kernels/saliency_bound.h"

namespace structkv::testing {

Inputs::Inputs(const Shape& shape, const Types& types, Layout layout, std::mt19937_64& random,
               int64_t misalign)
    : queries(types.queries, Layout::kHeadTokenDim, shape.query_heads, shape.window, shape.dim,
              misalign),
      keys(types.keys, layout, shape.kv_heads, shape.tokens, shape.dim, misalign) {
  queries.Fill(random);
  const float deviation = IsFp8(types.keys) ? kFp8Deviation : 1.0F;
  keys.Fill(random, deviation);
  if (!IsFp8(types.keys)) return;
  std::uniform_real_distribution<float> scale(0.5F / deviation, 1.5F / deviation);
  for (int64_t h = 0; h < shape.kv_heads; ++h) key_scales.push_back(scale(random));
}

SaliencyParams WindowMaxOf(const SaliencyParams& params) {
  SaliencyParams max = params;
  max.queries.heads = max.keys.heads = params.queries.heads / params.keys.heads;
  max.keys.head_stride = 0;
  max.key_scales = nullptr;
  max.window_max = true;
  return max;
}

std::vector<float> Expected(const SaliencyParams& params) {
  std::vector<float> out(params.keys.heads * params.keys.tokens);
  const auto oracle = reference::CreateReferenceBackend();
  EXPECT_EQ(oracle->Saliency(params, out.data(), nullptr, SerialFor), absl::OkStatus());
  return out;
}

// With a log-sum-exp of 0 and one row alone the oracle's output is exp(score), whose sum is that
// row's.
std::vector<float> RowLse(const SaliencyParams& params) {
  std::vector<float> lse;
  const auto oracle = reference::CreateReferenceBackend();
  const int64_t group = params.queries.heads / params.keys.heads;
  for (int64_t h = 0; h < params.queries.heads; ++h) {
    for (int64_t r = 0; r < params.queries.tokens; ++r) {
      SaliencyParams one = params;
      one.queries.data = params.queries.Row(h, r);
      one.queries.heads = one.queries.tokens = 1;
      one.keys.data = params.keys.Row(h / group, 0);
      one.keys.heads = 1;
      one.keys.tokens = params.keys.tokens - params.queries.tokens + r + 1;
      if (params.key_scales != nullptr) one.key_scales = params.key_scales + h / group;
      const float zero = 0;
      one.lse = &zero;
      std::vector<float> exps(one.keys.tokens);
      EXPECT_EQ(oracle->Saliency(one, exps.data(), nullptr, SerialFor), absl::OkStatus());
      double sum = 0;
      for (float e : exps) sum += e;
      lse.push_back(static_cast<float>(std::log(sum)));
    }
  }
  return lse;
}

void ExpectNear(const std::vector<float>& actual, const std::vector<float>& expected,
                const SaliencyParams& params, bool half) {
  const SaliencyBound bound(params, half);
  const int64_t tokens = params.keys.tokens;
  for (size_t i = 0; i < expected.size(); ++i) {
    const int64_t head = static_cast<int64_t>(i) / tokens;
    ASSERT_TRUE(bound.Holds(head, actual[i], expected[i]))
        << "head " << head << ", token " << static_cast<int64_t>(i) % tokens << ": " << actual[i]
        << ", expected " << expected[i] << " +- " << bound.Tolerance(head, expected[i]);
  }
}

void ExpectNear(const Backend& backend, const std::vector<float>& actual,
                const std::vector<float>& expected, const SaliencyParams& params) {
  ExpectNear(actual, expected, params, backend.KeepsHalfWeights(params));
}

}  // namespace structkv::testing
