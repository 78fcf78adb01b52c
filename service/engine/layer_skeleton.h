// The skeleton of the methods that take it from one layer alone (FastKV, GemFilter).
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "service/engine/buffer_pool.h"
#include "service/engine/layer_saliency.h"
#include "service/engine/prompt.h"
#include "service/engine/prompt_spec.h"

namespace structkv::engine {

// Scratch that LayerSkeleton needs, in bytes; 0 for other methods.
int64_t LayerSkeletonScratchBytes(const PromptSpec& spec);

// The skeleton that the spec's skeleton layer chooses, as a FIXED pivot without a transition layer.
// FastKV: the best tokens by the sum over KV heads of the smoothed saliency; the layers after it
// may come as skeleton rows. GemFilter: `positions`, what the layer keeps.
PivotResult LayerSkeleton(const PromptSpec& spec, const LayerSaliency& saliency,
                          const std::vector<int32_t>& positions, const Backend& backend,
                          BufferPool& pool, ParallelFor parallel);

}  // namespace structkv::engine
