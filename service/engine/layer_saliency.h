// The first step of a layer: its saliency, computed or taken from the worker, checked, and summed.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "service/engine/buffer_pool.h"
#include "service/engine/prompt.h"
#include "service/engine/prompt_spec.h"
#include "service/method/layer_metrics.h"

namespace structkv::engine {

// A layer's saliency. Finite, not negative, not all zero.
struct LayerSaliency {
  Buffer per_head;  // [kv_heads, N] float32; empty where the worker gave the sum alone
  Buffer sum;       // [N] float32; empty where there is one KV head, whose vector is the sum
  method::LayerMetrics metrics;

  const float* sum_scores() const { return (sum.empty() ? per_head : sum).as<const float>(); }
  const float* head_scores() const { return (per_head.empty() ? sum : per_head).as<const float>(); }
};

// Computes the saliency of `input` from its window queries and keys, or takes over its saliency
// buffer. INVALID_ARGUMENT names layer, token and KV head where a value is NaN, infinite or
// negative; it names the layer where all are zero or their sum is beyond kMaxSaliencyTotal.
absl::StatusOr<LayerSaliency> ComputeLayerSaliency(const PromptSpec& spec, const Backend& backend,
                                                   BufferPool& pool, LayerInput& input,
                                                   ParallelFor parallel);

// An input's window queries and keys as a backend scores them. Refers to the input and the spec.
class ScoredLayer {
 public:
  ScoredLayer(const PromptSpec& spec, const LayerInput& input);
  ScoredLayer(const ScoredLayer&) = delete;
  ScoredLayer& operator=(const ScoredLayer&) = delete;

  const SaliencyParams& params() const { return params_; }

  // What a call that scored it returned, with the layer's name, and with token and KV head where
  // the call has changed `bad`, whose head was kNoHead before.
  static constexpr int64_t kNoHead = -1;
  static absl::Status Named(absl::Status status, const LayerInput& input, int64_t first_head,
                            const BadStatistic& bad);

 private:
  const std::vector<float> key_scales_;
  SaliencyParams params_;
};

// Tokens whose mass is the sparsity metric.
int64_t TopCount(const PromptSpec& spec, int64_t tokens);
// The layer's metrics from the sums over its saliency, or what is wrong with these.
absl::StatusOr<method::LayerMetrics> MetricsOf(const PromptSpec& spec, int64_t layer,
                                               int64_t tokens, SaliencySums sums);

// The steps of it, for a layer whose heads several ranks hold. `first_head` is the KV head of the
// prompt that the input's first one is, for the texts of errors.
//
// Scores the input's KV heads from its window queries and keys into `out`, [kv_heads, tokens].
absl::Status ComputePerHead(const PromptSpec& spec, const Backend& backend, BufferPool& pool,
                            const LayerInput& input, int64_t first_head, float* out,
                            ParallelFor parallel);
// Checks a worker's own values, [heads, tokens].
absl::Status CheckGiven(const LayerInput& input, const Buffer& values, int64_t first_head,
                        int64_t heads, int64_t tokens, const Backend& backend,
                        ParallelFor parallel);
// Adds the sum over KV heads and the metrics.
absl::StatusOr<LayerSaliency> SumUp(const PromptSpec& spec, const Backend& backend,
                                    BufferPool& pool, int64_t layer, int64_t tokens,
                                    LayerSaliency saliency, ParallelFor parallel);

// Computed saliency sums to the number of query heads. A worker's may have any scale, up to where
// sums over layers stay far from overflow in float32.
inline constexpr double kMaxSaliencyTotal = 1e30;

}  // namespace structkv::engine
