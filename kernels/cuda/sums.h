// Sums over a saliency vector, from which a layer's metrics follow, and their parts.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/fused.h"
#include "kernels/cuda/host_device.h"
#include "kernels/cuda/warp.h"

namespace structkv::cuda {

// Of kPartTokens tokens; see SaliencySums of kernels/backend.h.
struct SumsPart {
  double total = 0;
  double sum_s_log_s = 0;
  double sum_squares = 0;
};

// So few that one warp has the tokens at hand where their saliency is computed.
inline constexpr int kPartTokens = 64;
STRUCTKV_HOST_DEVICE constexpr int64_t SumsParts(int64_t tokens) {
  return (tokens + kPartTokens - 1) / kPartTokens;
}

// Of a row: its parts, in their order, and the mass of the largest.
struct RowSums {
  SumsPart all;
  double top_mass = 0;
};

STRUCTKV_HOST_DEVICE inline void Add(float saliency, SumsPart* part) {
  const double s = saliency;
  part->total += s;
  if (s > 0) part->sum_s_log_s = FusedMultiplyAdd(s, log(s), part->sum_s_log_s);
  part->sum_squares = FusedMultiplyAdd(s, s, part->sum_squares);
}

STRUCTKV_HOST_DEVICE constexpr double Plus(double a, double b) { return a + b; }
STRUCTKV_HOST_DEVICE constexpr SumsPart Plus(const SumsPart& a, const SumsPart& b) {
  return {a.total + b.total, a.sum_s_log_s + b.sum_s_log_s, a.sum_squares + b.sum_squares};
}

template <class Block>
STRUCTKV_DEVICE SumsPart SumLanes(Block& block, const SumsPart& part) {
  return {SumLanes(block, part.total), SumLanes(block, part.sum_s_log_s),
          SumLanes(block, part.sum_squares)};
}

// Writes the part that begins at token `first`, of which a lane has every kLanes-th token's
// saliency from first + lane on. Called by a whole warp.
template <class Block>
STRUCTKV_DEVICE void WritePart(Block& block, int64_t first, int64_t tokens,
                               const float (&saliency)[kPartTokens / Block::kLanes],
                               SumsPart* parts) {
  SumsPart part;
  STRUCTKV_UNROLL
  for (int i = 0; i < kPartTokens / Block::kLanes; ++i) {
    if (first + i * Block::kLanes + block.lane() < tokens) Add(saliency[i], &part);
  }
  part = SumLanes(block, part);
  if (block.lane() == 0 && first < tokens) parts[first / kPartTokens] = part;
}

// The sum of at(0) .. at(count - 1), in an order that `count` alone fixes. Called by a whole warp.
template <class Block, class At>
STRUCTKV_DEVICE auto SumInOrder(Block& block, int count, const At& at) {
  decltype(at(0)) sum = {};
  STRUCTKV_UNROLL_4
  for (int i = block.lane(); i < count; i += Block::kLanes) sum = Plus(sum, at(i));
  return SumLanes(block, sum);
}

}  // namespace structkv::cuda
