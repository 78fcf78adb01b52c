// Saliency of query heads, each by itself, where a KV head's is more than the sum of all rows.
#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "service/engine/buffer_pool.h"
#include "service/engine/prompt_spec.h"

namespace structkv::engine {

// Whether a maximum is taken over the window or over a group of several query heads, which the sum
// over both does not hold.
bool TellsQueryHeadsApart(const PromptSpec& spec);

// Of `params`, the first KV head and its query heads, as if each of these had the KV head's keys
// for itself: the backend then tells the query heads apart.
SaliencyParams OneHeadOf(const SaliencyParams& params);

// As Backend::Saliency, out[g, j] being the sum or the maximum, by `reduce`, over the query heads
// of group g. With `params.window_max` groups of any size are allowed. Takes [query heads of a
// group, tokens] floats from `pool` meanwhile.
absl::Status QueryHeadSaliency(const SaliencyParams& params, method::GroupReduce reduce,
                               const Backend& backend, BufferPool& pool, float* out,
                               BadStatistic* bad, ParallelFor parallel);

}  // namespace structkv::engine
