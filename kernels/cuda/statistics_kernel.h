// One pass over a layer's saliency that others have computed: sums over its heads, what is wrong
// with it, centrality, and the parts of its sums; and smoothing.
#pragma once

#include <cstdint>

#include "kernels/cuda/fused.h"
#include "kernels/cuda/radix.h"
#include "kernels/cuda/sums.h"

namespace structkv::cuda {

struct StatisticsParams {
  const float* values = nullptr;  // [heads, tokens], device, not null
  int64_t heads = 0;              // 1 or more; 1: `values` are the sum
  int64_t tokens = 0;             // 1 .. 2^31 - 1
  float* sum = nullptr;           // [tokens], device; null: not wanted. May not overlap `values`
  float* centrality = nullptr;    // [tokens], device; becomes decay * centrality + sum; may be null
  float decay = 0;
  SumsPart* parts = nullptr;  // [SumsParts(tokens)], device; of the sum; may be null
  // One, device; becomes the least of itself and BadPlace of the values that are NaN, infinite or
  // negative; the caller sets it to kNoBad before. Null: not looked for.
  uint64_t* bad = nullptr;
};

inline constexpr uint64_t kNoBad = ~uint64_t{0};

// The order in which bad values are named: the lowest token, and there the lowest head.
STRUCTKV_HOST_DEVICE constexpr uint64_t BadPlace(int64_t head, int64_t token) {
  return static_cast<uint64_t>(token) << 32 | static_cast<uint64_t>(head);
}
constexpr int64_t PlaceHead(uint64_t place) { return static_cast<int64_t>(place & 0xFFFFFFFFU); }
constexpr int64_t PlaceToken(uint64_t place) { return static_cast<int64_t>(place >> 32); }

// Whether a value is NaN, infinite or negative; -0.0 is not.
STRUCTKV_HOST_DEVICE constexpr bool IsBad(float value) {
  return !(value >= 0 && value <= 3.402823466e38F);
}

// A block takes one tile, a thread four of its tokens.
inline constexpr int kStatisticsThreads = 128;
inline constexpr int kStatisticsTokens = kTileTokens / kStatisticsThreads;

template <class Block>
STRUCTKV_DEVICE void TileStatistics(Block& block, const StatisticsParams& params) {
  const int64_t first = block.index() * kTileTokens + block.thread();
  float sums[kStatisticsTokens] = {};
  uint64_t bad = kNoBad;
  for (int64_t head = 0; head < params.heads; ++head) {
    const float* row = params.values + head * params.tokens;
    STRUCTKV_UNROLL
    for (int k = 0; k < kStatisticsTokens; ++k) {
      const int64_t token = first + k * kStatisticsThreads;
      const float value = token < params.tokens ? row[token] : 0.0F;
      sums[k] = head == 0 ? value : sums[k] + value;
      if (IsBad(value)) bad = bad < BadPlace(head, token) ? bad : BadPlace(head, token);
    }
  }
  if (params.bad != nullptr && bad != kNoBad) block.Min(params.bad, bad);
  STRUCTKV_UNROLL
  for (int k = 0; k < kStatisticsTokens; ++k) {
    const int64_t token = first + k * kStatisticsThreads;
    if (token < params.tokens && params.sum != nullptr) params.sum[token] = sums[k];
    if (token < params.tokens && params.centrality != nullptr) {
      params.centrality[token] = FusedMultiplyAdd(params.decay, params.centrality[token], sums[k]);
    }
    if (params.parts != nullptr) WritePart(block, token, params.tokens, sums[k], params.parts);
  }
}

enum class Smoothing : uint8_t { kNone, kMean, kMaximum };

// Smooths rows as Backend::Pool does (kernels/backend.h).
struct PoolParams {
  const float* in = nullptr;  // [rows, tokens], device, not null
  float* out = nullptr;       // the same, not null, may not overlap `in`
  int64_t rows = 0;           // 1 .. 65535
  int64_t tokens = 0;         // 1 .. 2^31 - 1
  int64_t row_stride = 0;     // from a row to the next, `tokens` or more
  Smoothing smoothing = Smoothing::kNone;
  int64_t kernel = 1;  // odd, 1 or more
};

// The smoothed value at a token of one row.
STRUCTKV_HOST_DEVICE inline float PoolAt(const float* in, int64_t tokens, Smoothing smoothing,
                                         int64_t kernel, int64_t token) {
  if (smoothing == Smoothing::kNone || kernel == 1) return in[token];
  const int64_t begin = token > kernel / 2 ? token - kernel / 2 : 0;
  const int64_t end = token + kernel / 2 + 1 < tokens ? token + kernel / 2 + 1 : tokens;
  float value = in[begin];
  if (smoothing == Smoothing::kMaximum) {
    for (int64_t j = begin + 1; j < end; ++j) value = in[j] > value ? in[j] : value;
    return value;
  }
  for (int64_t j = begin + 1; j < end; ++j) value += in[j];
  return value * (1.0F / static_cast<float>(kernel));
}

}  // namespace structkv::cuda
