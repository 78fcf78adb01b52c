// The first step of a layer that several ranks hold: their parts of its saliency put together.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "service/engine/layer_saliency.h"
#include "service/engine/shard.h"

namespace structkv::engine {

// As ComputeLayerSaliency, of parts[i] with the heads of shards[i]. Computed from window queries,
// or given per KV head that no two shards share, it is that of the whole layer to the bit: a KV
// head is scored by the queries of all its ranks together, against the keys of the first of them.
// What several shards give for one KV head, or with Statistic::kSaliency, is summed in their order.
// `culprit` is set to the shard whose tensors are at fault; it stays as it is where that is none
// alone.
absl::StatusOr<LayerSaliency> ComputeShardedSaliency(const PromptSpec& spec, const Backend& backend,
                                                     BufferPool& pool,
                                                     absl::Span<const Shard> shards,
                                                     absl::Span<LayerInput> parts,
                                                     ParallelFor parallel, int64_t* culprit);

}  // namespace structkv::engine
