// Local saliency (docs/method.md, section 1) in tiles, over a table of kernels.
//
// The query rows of a KV head (window rows of its group's query heads) are taken in blocks of
// kRowBlock, the tokens in tiles of kTileTokens. Without the caller's log-sum-exp a first pass
// stores each tile's exponentials relative to the tile's own maximum; a second one weighs them once
// the maxima and sums of all tiles are known, together with the first pass of the heads after it.
// With it one pass is enough.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/scratch_pool.h"

namespace structkv::cpu {

// As Backend::Saliency; the shapes were checked. `out` is [kv_heads, tokens], not null.
absl::Status Saliency(const KernelTable& table, const SaliencyParams& params, ScratchPool* pool,
                      float* out, BadStatistic* bad, ParallelFor parallel);

// As Backend::KeepsHalfWeights.
bool KeepsHalfWeights(const KernelTable& table, const SaliencyParams& params);

// Bytes that a call takes from the pool.
int64_t SaliencyScratchBytes(const KernelTable& table, const SaliencyParams& params);

}  // namespace structkv::cpu
