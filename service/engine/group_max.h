// Saliency where a KV head takes the maximum over its query heads in place of their sum.
#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "service/engine/buffer_pool.h"

namespace structkv::engine {

// Of `params`, the first KV head and its query heads, as if each of these had the KV head's keys
// for itself: the backend then tells the query heads apart.
SaliencyParams OneHeadOf(const SaliencyParams& params);

// As Backend::Saliency, out[g, j] being the maximum over the query heads of group g. Takes
// [query heads of a group, tokens] floats from `pool` meanwhile.
absl::Status GroupMaxSaliency(const SaliencyParams& params, const Backend& backend,
                              BufferPool& pool, float* out, BadStatistic* bad,
                              ParallelFor parallel);

}  // namespace structkv::engine
