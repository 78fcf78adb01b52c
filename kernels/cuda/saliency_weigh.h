// From stored exponentials to outputs, over what a block of threads can do (TensorBlock).
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/saliency_plan.h"
#include "kernels/cuda/saliency_steps.h"

namespace structkv::cuda {

// The row sums of blocks of tokens to each row's log-sum-exp over ln 2; a block of kCombineThreads
// for each kCombineRows padded rows. `shared` is [threads].
template <class Block>
STRUCTKV_DEVICE void CombineRows(Block& block, const SaliencyPlan& plan, Floats2* shared) {
  constexpr int kStep = kCombineThreads / kCombineRows;
  constexpr int kInFlight = 16;
  const auto row = static_cast<int>(block.index()) * kCombineRows + block.thread() % kCombineRows;
  const bool there = row % plan.padded_rows() < plan.rows;
  const Floats2* const parts =
      plan.row_sums + int64_t{row / kChunkRows} * plan.blocks * kChunkRows + row % kChunkRows;
  Floats2 all = {kLowestScore, 0.0F};
  for (int first = block.thread() / kCombineRows; there && first < plan.blocks;
       first += kInFlight * kStep) {
    const Floats2* const from = parts + int64_t{first} * kChunkRows;
    Floats2 some[kInFlight];
    STRUCTKV_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const bool within = first + i * kStep < plan.blocks;
      some[i] = within ? from[i * kStep * kChunkRows] : Floats2{kLowestScore, 0.0F};
    }
    float top = all.x;
    STRUCTKV_UNROLL
    for (int i = 0; i < kInFlight; ++i) top = fmaxf(top, some[i].x);
    all.y *= Exp2(all.x - top);
    all.x = top;
    STRUCTKV_UNROLL
    for (int i = 0; i < kInFlight; ++i) all.y += some[i].y * Exp2(some[i].x - top);
  }
  shared[block.thread()] = all;
  block.Sync();
  for (int half = kCombineThreads / 2; half >= kCombineRows; half /= 2) {
    if (block.thread() < half) {
      const Floats2 other = shared[block.thread() + half];
      const float top = fmaxf(all.x, other.x);
      all.y = all.y * Exp2(all.x - top) + other.y * Exp2(other.x - top);
      all.x = top;
      shared[block.thread()] = all;
    }
    block.Sync();
  }
  if (block.thread() < kCombineRows) {
    plan.row_lse[row] = there ? all.x + log2f(all.y) : kInfinity;
  }
}

// Stored exponentials of 16 tokens of a head to their sums.
template <bool kMax, class Block>
STRUCTKV_DEVICE void WeighTokens(Block& block, const SaliencyPlan& plan, int head, int token_block,
                                 int in_tile, float* of_head) {
  float sums[2] = {0.0F, 0.0F};
  for (int chunk = 0; chunk < plan.row_chunks; ++chunk) {
    const Words4* const from = plan.exps + ExpsIndex(plan, head, chunk, token_block) + block.lane();
    const Words4 words[2] = {block.Once16(from), block.Once16(from + kLanes)};
    // The lane's rows are two of each tile.
    const int first_row = FragmentCRow(block.lane(), 0);
    const Floats2* const row_sums =
        plan.row_sums + RowSumsIndex(plan, head, chunk, token_block) + first_row;
    const float* const lse =
        plan.row_lse + int64_t{head} * plan.padded_rows() + chunk * kChunkRows + first_row;
    float tops[kRowTiles][2];
    float lses[kRowTiles][2];
    STRUCTKV_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      tops[i / 2][i % 2] = row_sums[i / 2 * kTileRows + i % 2].x;
      lses[i / 2][i % 2] = lse[i / 2 * kTileRows + i % 2];
    }
    block.KeepOrder();
    float of_chunk[2] = {0.0F, 0.0F};
    STRUCTKV_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      const float factors[2] = {Exp2(tops[tile][0] - lses[tile][0]),
                                Exp2(tops[tile][1] - lses[tile][1])};
      STRUCTKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t exps = words[tile / 2].w[tile % 2 * 2 + half];
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
    PrefetchTile(block, plan, tile);
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
