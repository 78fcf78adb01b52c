// From stored exponentials to outputs, over what a block of threads can do (TensorBlock).
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/saliency_plan.h"
#include "kernels/cuda/saliency_steps.h"

namespace structkv::cuda {

// Stored tile sums to each row's log-sum-exp over ln 2; one block for each padded row. `shared` is
// [threads].
template <class Block>
STRUCTKV_DEVICE void CombineRow(Block& block, const SaliencyPlan& plan, Floats2* shared) {
  const int64_t row = block.index();
  if (row % plan.padded_rows() >= plan.rows) {
    if (block.thread() == 0) plan.row_lse[row] = kInfinity;
    return;
  }
  const Floats2* const parts = plan.row_sums + row * plan.blocks;
  Floats2 all = {kLowestScore, 0.0F};
  const auto add = [&all](const Floats2& part) {
    const float top = fmaxf(all.x, part.x);
    all.y = all.y * Exp2(all.x - top) + part.y * Exp2(part.x - top);
    all.x = top;
  };
  for (int i = block.thread(); i < plan.blocks; i += block.threads()) add(parts[i]);
  shared[block.thread()] = all;
  block.Sync();
  for (int half = block.threads() / 2; half > 0; half /= 2) {
    if (block.thread() < half) {
      add(shared[block.thread() + half]);
      shared[block.thread()] = all;
    }
    block.Sync();
  }
  if (block.thread() == 0) plan.row_lse[row] = all.x + log2f(all.y);
}

// Stored exponentials of 16 tokens of a head to their sums.
template <bool kMax, class Block>
STRUCTKV_DEVICE void WeighTokens(Block& block, const SaliencyPlan& plan, int head, int token_block,
                                 int in_tile, float* of_head) {
  float sums[2] = {0.0F, 0.0F};
  for (int chunk = 0; chunk < plan.row_chunks; ++chunk) {
    const Words4* const from = plan.exps + ExpsIndex(plan, head, chunk, token_block);
    const Words4 words[2] = {block.Once16(from + block.lane()),
                             block.Once16(from + kLanes + block.lane())};
    float of_chunk[2] = {0.0F, 0.0F};
    STRUCTKV_UNROLL
    for (int tile_row = 0; tile_row < kRowTiles; ++tile_row) {
      float factors[2];
      STRUCTKV_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = chunk * kChunkRows + tile_row * kTileRows + FragmentCRow(block.lane(), i);
        const float top = plan.row_sums[RowSumsIndex(plan, head, row, token_block)].x;
        factors[i] =
            Exp2(top - plan.row_lse[static_cast<int64_t>(head) * plan.padded_rows() + row]);
      }
      STRUCTKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t exps = words[tile_row / 2].w[tile_row % 2 * 2 + half];
        of_chunk[half] = Joined<kMax>(of_chunk[half], HalfToFloat(exps & 0xFFFFU) * factors[0]);
        of_chunk[half] = Joined<kMax>(of_chunk[half], HalfToFloat(exps >> 16) * factors[1]);
      }
    }
    sums[0] = Joined<kMax>(sums[0], of_chunk[0]);
    sums[1] = Joined<kMax>(sums[1], of_chunk[1]);
  }
  LeaveSums<kMax>(block, plan, sums, in_tile, of_head);
}

// Stored exponentials to outputs; shared memory and blocks as Scores.
template <class Block>
STRUCTKV_DEVICE void WeighExps(Block& block, const SaliencyPlan& plan, float* shared) {
  const int units = plan.kv_heads * plan.tile_units;
  for (int tile = static_cast<int>(block.index()); tile < plan.tiles;
       tile += static_cast<int>(block.blocks())) {
    for (int u = block.warp(); u < units * kUnitBlocks; u += block.warps()) {
      const int head = u % plan.kv_heads;
      const int in_tile = u / plan.kv_heads * kBlockTokens;
      const int64_t first = int64_t{tile} * plan.tile_tokens() + in_tile;
      if (first >= plan.tokens) continue;
      const int token_block = static_cast<int>(first / kBlockTokens);
      float* const of_head = shared + head * plan.tile_tokens();
      if (plan.window_max) {
        WeighTokens<true>(block, plan, head, token_block, in_tile, of_head);
      } else {
        WeighTokens<false>(block, plan, head, token_block, in_tile, of_head);
      }
    }
    block.Sync();
    WriteTile(block, plan, tile, shared);
    block.Sync();
  }
}

}  // namespace structkv::cuda
