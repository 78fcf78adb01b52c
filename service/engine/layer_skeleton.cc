#include "service/engine/layer_skeleton.h"

#include <algorithm>

namespace structkv::engine {
namespace {

// The sum over the KV heads, in head order, of the smoothed scores of the tokens before the window,
// [tokens]; 0 for the window's. `scores` is [heads, tokens], `smoothed` [before] of scratch.
void SumOfSmoothed(const PromptSpec& spec, const float* scores, const Backend& backend,
                   float* smoothed, float* sum, ParallelFor parallel) {
  const int64_t tokens = spec.prompt_tokens;
  const int64_t before = tokens - spec.window_rows();
  std::fill(sum, sum + tokens, 0.0F);
  for (int64_t head = 0; head < spec.geometry.kv_heads && before > 0; ++head) {
    const float* row = scores + head * tokens;
    if (spec.method.pooling != Pooling::kNone) {
      backend.Pool(row, before, spec.method.pooling, spec.method.pooling_kernel, smoothed);
      row = smoothed;
    }
    backend.Accumulate(/*decay=*/1.0F, row, sum, before, parallel);
  }
}

}  // namespace

int64_t LayerSkeletonScratchBytes(const PromptSpec& spec) {
  if (spec.method.method != method::Method::kFastKv) return 0;
  return 2 * spec.prompt_tokens * static_cast<int64_t>(sizeof(float));
}

PivotResult LayerSkeleton(const PromptSpec& spec, const LayerSaliency& saliency,
                          const std::vector<int32_t>& positions, const Backend& backend,
                          BufferPool& pool, ParallelFor parallel) {
  PivotResult result;
  result.decision.mode = method::PivotMode::kFixed;
  result.decision.pivot_layer = *spec.method.skeleton_layer();
  result.decision.decided_at_layer = result.decision.pivot_layer;
  result.decision.layers = {
      {.layer = result.decision.pivot_layer, .metrics = saliency.metrics, .transition = {}}};
  if (spec.method.method == method::Method::kGemFilter) {
    result.skeleton = positions;
    return result;
  }
  if (result.decision.pivot_layer + 1 < spec.geometry.layers) {
    result.decision.skeleton_from_layer = result.decision.pivot_layer + 1;
  }
  const Buffer scratch = pool.Acquire(LayerSkeletonScratchBytes(spec));
  auto* sum = scratch.as<float>();
  SumOfSmoothed(spec, saliency.head_scores(), backend, sum + spec.prompt_tokens, sum, parallel);
  result.skeleton.resize(spec.skeleton_tokens());
  backend.Select({.scores = sum,
                  .tokens = spec.prompt_tokens,
                  .window = spec.window_rows(),
                  .keep = spec.skeleton_tokens()},
                 result.skeleton.data());
  return result;
}

}  // namespace structkv::engine
