// From queries and log-sum-exps to what the multiplications take, over what a block of threads can
// do (TensorBlock).
#pragma once

#include <cstdint>

#include "kernels/cuda/elements.h"
#include "kernels/cuda/pieces.h"
#include "kernels/cuda/saliency_plan.h"

namespace structkv::cuda {

// Queries need no alignment beyond their bytes'.
template <DType kQuery>
STRUCTKV_DEVICE float QueryElement(const unsigned char* row, int element) {
  constexpr int kBytes = kElementBytes<kQuery>;
  uint32_t bits = 0;
  STRUCTKV_UNROLL
  for (int i = 0; i < kBytes; ++i) {
    bits |= static_cast<uint32_t>(row[kBytes * element + i]) << (8 * i);
  }
  return FromBits<kQuery>(bits);
}

// Packs the queries as the multiplications take them, zeros where there are none, and converts the
// log-sum-exps. Any number of blocks.
template <DType kQuery, class Block>
STRUCTKV_DEVICE void PackQueries(Block& block, const SaliencyPlan& plan) {
  constexpr int kParts = kQuery == DType::kF32 ? 3 : 1;
  constexpr int kBytes = kElementBytes<kQuery>;
  const int64_t step = block.blocks() * block.threads();
  const int64_t first = block.index() * block.threads() + block.thread();
  const int64_t pieces = PackedIndex(plan, 1, plan.kv_heads, 0, 0);
  for (int64_t i = first; i < pieces; i += step) {
    const int lane = static_cast<int>(i % kLanes);
    const int tile = static_cast<int>(i / kLanes % kRowTiles);
    const int64_t outer = i / (kLanes * kRowTiles);
    const int pair = static_cast<int>(outer % plan.pairs);
    const int chunk = static_cast<int>(outer / plan.pairs % plan.row_chunks);
    const int head = static_cast<int>(outer / plan.pairs / plan.row_chunks);
    const int row = chunk * kChunkRows + tile * kTileRows + FragmentBRow(lane);
    const int dim = PieceDim(pair, lane);
    float values[kPieceDims] = {};
    if (row < plan.rows && dim < plan.dim) {
      const int64_t query_head = int64_t{head} * plan.group + row / plan.window;
      const int window_row = row % plan.window;
      const unsigned char* from =
          plan.queries +
          (query_head * plan.query_head_stride + window_row * plan.query_row_stride) * kBytes;
      STRUCTKV_UNROLL
      for (int e = 0; e < kPieceDims; ++e) {
        values[e] = QueryElement<kQuery>(from, dim + e);
        if (!IsFinite(values[e])) {
          block.Min(&plan.flags->query,
                    BadRow(query_head * plan.window + window_row, KindOf(values[e])));
        }
      }
    }
    Words4* const to = plan.packed + outer * kParts * kRowTiles * kLanes + tile * kLanes + lane;
    if constexpr (kQuery == DType::kF32) {
      uint32_t parts[kParts][kPieceWords];
      SplitPiece(values, parts);
      for (int part = 0; part < kParts; ++part) {
        to[part * kRowTiles * kLanes] = {
            {parts[part][0], parts[part][1], parts[part][2], parts[part][3]}};
      }
    } else {
      Words4 words;
      STRUCTKV_UNROLL
      for (int w = 0; w < kPieceWords; ++w) {
        words.w[w] = kQuery == DType::kF16 ? Halves(values[2 * w], values[2 * w + 1])
                                           : UpperHalves(values[2 * w], values[2 * w + 1]);
      }
      *to = words;
    }
  }
  if (plan.lse == nullptr) return;
  const int padded = plan.padded_rows();
  for (int64_t i = first; i < int64_t{plan.kv_heads} * padded; i += step) {
    const int row = static_cast<int>(i % padded);
    float lse = kInfinity;
    if (row < plan.rows) {
      const int64_t at = i / padded * plan.rows + row;
      const float given = plan.lse[at];
      if (!IsFinite(given)) block.Min(&plan.flags->lse, BadRow(at, KindOf(given)));
      lse = given * 1.44269504F;
    }
    plan.row_lse[i] = lse;
  }
}

}  // namespace structkv::cuda
