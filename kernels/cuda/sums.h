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

// Each lane of a warp has one of the tokens at hand where their saliency is computed.
inline constexpr int kPartTokens = 32;
STRUCTKV_HOST_DEVICE constexpr int64_t SumsParts(int64_t tokens) {
  return (tokens + kPartTokens - 1) / kPartTokens;
}

// Of a row, or of a tile of one: all of it, and the mass of the largest.
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

STRUCTKV_HOST_DEVICE constexpr SumsPart Plus(const SumsPart& a, const SumsPart& b) {
  return {a.total + b.total, a.sum_s_log_s + b.sum_s_log_s, a.sum_squares + b.sum_squares};
}

template <class Block>
STRUCTKV_DEVICE SumsPart SumLanes(Block& block, const SumsPart& part) {
  return {SumLanes(block, part.total), SumLanes(block, part.sum_s_log_s),
          SumLanes(block, part.sum_squares)};
}

STRUCTKV_HOST_DEVICE constexpr RowSums Plus(const RowSums& a, const RowSums& b) {
  return {Plus(a.all, b.all), a.top_mass + b.top_mass};
}

template <class Block>
STRUCTKV_DEVICE RowSums SumLanes(Block& block, const RowSums& sums) {
  return {SumLanes(block, sums.all), SumLanes(block, sums.top_mass)};
}

// Writes the part of which a lane has `token` and its saliency, where there is such a token. Called
// by a whole warp.
template <class Block>
STRUCTKV_DEVICE void WritePart(Block& block, int64_t token, int64_t tokens, float saliency,
                               SumsPart* parts) {
  static_assert(kPartTokens == Block::kLanes);
  SumsPart part;
  if (token < tokens) Add(saliency, &part);
  part = SumLanes(block, part);
  if (block.lane() == 0 && token < tokens) parts[token / kPartTokens] = part;
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
