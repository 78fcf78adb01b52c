// How a saliency call is cut up; a function of the shapes alone, so that results are too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/kernel_table.h"

namespace structkv::cpu {

struct SaliencyPlan {
  // Tiles that one task takes.
  static constexpr int64_t kTilesPerTask = 8;
  // Exponentials kept between the passes: about half of a last-level cache as float32. One block of
  // rows is the least.
  static constexpr int64_t kStoreTargetBytes = int64_t{16} << 20;
  // What a block of rows may take as float32 before it is kept as float16, where that can be: more
  // leaves the cache, with the keys that stream through it.
  static constexpr int64_t kMostFloatBytes = kStoreTargetBytes / 2;

  int64_t tokens = 0;
  int64_t window = 0;
  int64_t kv_heads = 0;
  int64_t group_rows = 0;    // query rows of a KV head
  int64_t blocks = 0;        // blocks of rows of a KV head
  int64_t row_multiple = 0;  // rows are padded to this
  int64_t tiles = 0;
  int64_t chunks = 0;  // tasks along the tokens
  bool pairs = false;  // queries are packed as bf16 pairs
  bool two_pass = false;
  bool half = false;  // exponentials are stored as float16

  // A batch of the first pass: so many blocks of each of so many heads; more than one head only if
  // all its blocks fit.
  int64_t batch_heads = 0;
  int64_t batch_blocks = 0;

  // Per block of rows: packed queries, stored exponentials, tile statistics.
  int64_t packed_floats = 0;
  int64_t store_bytes = 0;
  int64_t tile_floats = 0;

  static SaliencyPlan Make(const KernelTable& table, const SaliencyParams& params) {
    SaliencyPlan plan;
    plan.tokens = params.keys.tokens;
    plan.window = params.queries.tokens;
    plan.kv_heads = params.keys.heads;
    plan.group_rows = params.queries.heads / params.keys.heads * plan.window;
    plan.blocks = (plan.group_rows + kRowBlock - 1) / kRowBlock;
    plan.row_multiple = table.row_multiple;
    plan.tiles = (plan.tokens + kTileTokens - 1) / kTileTokens;
    plan.chunks = (plan.tiles + kTilesPerTask - 1) / kTilesPerTask;
    // 8-bit keys are widened.
    plan.pairs = params.queries.dtype == DType::kBF16 && table.bf16_scores != nullptr;
    plan.two_pass = params.lse == nullptr;
    const int64_t rows = plan.PaddedRows(0);  // the first block is the largest
    plan.packed_floats = rows * (plan.pairs ? params.keys.dim / 2 : params.keys.dim);
    const int64_t block_bytes = rows * plan.tokens * static_cast<int64_t>(sizeof(float));
    plan.half = plan.two_pass && plan.pairs && table.bf16_half_exponentials != nullptr &&
                block_bytes > kMostFloatBytes;
    plan.store_bytes = (rows * plan.tokens * plan.element_bytes() + 63) / 64 * 64;
    plan.tile_floats = rows * plan.tiles;
    const int64_t fit = std::max<int64_t>(1, kStoreTargetBytes / block_bytes);
    plan.batch_heads = std::clamp<int64_t>(fit / plan.blocks, 1, plan.kv_heads);
    plan.batch_blocks = std::min(fit, plan.blocks);
    return plan;
  }

  int64_t Rows(int64_t block) const { return std::min(kRowBlock, group_rows - block * kRowBlock); }
  int64_t PaddedRows(int64_t block) const {
    return (Rows(block) + row_multiple - 1) / row_multiple * row_multiple;
  }
  // Of a stored exponential.
  int64_t element_bytes() const { return half ? sizeof(uint16_t) : sizeof(float); }
  // Blocks of rows whose exponentials are stored at a time.
  int64_t batch_units() const { return batch_heads * batch_blocks; }

  int64_t packed_total() const { return kv_heads * blocks * packed_floats; }
  int64_t scratch_bytes() const {
    constexpr int64_t kFloat = sizeof(float);
    const int64_t stored = two_pass ? batch_units() * (store_bytes + 2 * tile_floats * kFloat) : 0;
    return packed_total() * kFloat + stored;
  }
};

}  // namespace structkv::cpu
