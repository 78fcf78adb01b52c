// One prompt's compression, from tensors to compacted tensors. Runs without a server: a program, a
// test or the command line can embed it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "service/engine/buffer_pool.h"
#include "service/engine/prompt_spec.h"
#include "service/engine/shard.h"
#include "service/engine/stage_times.h"
#include "service/method/layer_metrics.h"
#include "service/method/pivot_detector.h"

namespace structkv::engine {

// One layer's tensors, in the spec's layout, keys and values dense or paged; each of the size that
// PromptSpec::InputBytes says, empty where that is 0. A layer of skeleton rows has `positions`, and
// in place of N the skeleton's tokens; PromptSpec::SkeletonInputBytes says its sizes. Keys and
// values may be lent, and may then lie in a GPU's memory (kernels/backend.h), as the room for what
// is kept of them may; the others are looked at more than once, and may not.
struct LayerInput {
  int64_t layer = 0;
  Buffer keys;            // [kv_heads, N, key_dim] or the other layout
  Buffer values;          // [kv_heads, N, value_dim] or the other layout; empty: part of the keys
  Buffer window_queries;  // [query_heads, window_rows, key_dim]
  Buffer window_lse;      // [query_heads, window_rows] float32
  Buffer saliency;        // [N] or [kv_heads, N] float32
  Buffer key_scales;      // [1] or [kv_heads] float32, of fp8 keys
  Buffer value_scales;    // likewise
  // Tokens that the layer holds: the skeleton exactly. Empty: all. Outlives the call.
  absl::Span<const int32_t> positions;
  // Where kept rows are to be written, PromptSpec::KeptBytes or more; empty: into the pool's
  // buffers.
  Buffer key_room;
  Buffer value_room;
  // What Prompt::Stage has begun. Last: it goes before the keys do.
  std::unique_ptr<StagedLayer> staged;
};

// The rows of a layer that are to be pulled (PromptSpec::pull).
struct RowPull {
  int64_t layer = 0;
  int64_t kept_tokens = 0;         // rows of each KV head
  bool keys = false;               // rows of keys are to be pulled beside those of values
  std::vector<int32_t> positions;  // as LayerOutput's
};

// The rows that layers may come with once the pivot is known.
struct Skeleton {
  std::optional<int64_t> from_layer;  // the first layer that may; none: no layer may
  std::vector<int32_t> positions;     // ascending
};

// One layer's answer. A layer of skeleton rows keeps at most the skeleton; its positions are those
// of the prompt, its metrics and saliency are over the skeleton's tokens.
struct LayerOutput {
  int64_t layer = 0;
  int64_t kept_tokens = 0;
  int64_t kept_blocks = 0;                      // where keys are paged and come back
  std::optional<method::LayerMetrics> metrics;  // methods with statistics
  std::vector<int32_t> positions;               // [kept] or [kv_heads, kept]
  Buffer keys;                                  // kept rows, spec's layout; empty for a plan.
                                                // Paged: kept_blocks blocks in order, zeros behind.
                                                // Lent where they are in the input's room, and only
                                                // then
  Buffer values;                                // likewise
  Buffer key_scales;                            // as they came; empty for a plan
  Buffer value_scales;                          // likewise
  Buffer saliency;                              // on request: [N] or [kv_heads, N] float32
};

// Completes the answer of a layer with the keys and values that were pulled for it, each tensor of
// the size that PromptSpec::PulledBytes says; what is not pulled is empty. Rows that are lent, and
// those that there is room for, are copied; others pass through. INVALID_ARGUMENT for another size.
absl::Status TakeRows(const PromptSpec& spec, BufferPool& pool, LayerInput rows,
                      LayerOutput* output);

// The pivot and the skeleton.
struct PivotResult {
  method::PivotDecision decision;
  std::vector<int32_t> skeleton;  // ascending
  std::vector<float> centrality;  // on request: [N]
};

// Not thread-safe: one call at a time. Layers may come in any order, each once; the answers are the
// same.
class Prompt {
 public:
  // `spec` was validated; `backend` and `pool` outlive the prompt. `shards`, where there are any,
  // are valid, apart from each other and complete: the ranks that hold the prompt together.
  Prompt(PromptSpec spec, const Backend* backend, BufferPool* pool, std::vector<Shard> shards = {});
  ~Prompt();

  const PromptSpec& spec() const;

  // Scores, selects and gathers one layer, and consumes its buffers (where every token is kept, as
  // with Full, keys and values pass through uncopied). What is pulled is missing in the answer, and
  // TakeRows() puts it in.
  //   INVALID_ARGUMENT     layer, token and KV head are named where the statistics hold NaN, Inf or
  //   a
  //                        negative value, the layer where they are all zero or too large to sum
  //                        up; the prompt is then of no further use. Also a scale that is no finite
  //                        number above 0 (layer and KV head are named), a tensor of the wrong
  //                        size, and positions that are not the skeleton, or come too early.
  //   OUT_OF_RANGE         there is no such layer
  //   ALREADY_EXISTS       the layer was answered
  //   FAILED_PRECONDITION  an earlier layer's statistics were bad
  absl::StatusOr<LayerOutput> CompressLayer(LayerInput input, ParallelFor parallel);

  // Begins to bring a layer to where it will be computed, while another one is: its CompressLayer
  // is next. Returns at once, and may be called while a layer is compressed. The layer's buffers
  // are complete, and stay as they are.
  void Stage(LayerInput* input) const;

  // The same of a layer that the ranks hold: parts[i] has the tensors of shards[i]'s heads alone,
  // and answer i its heads' rows, all at the positions that the whole layer would keep. Also
  //   INVALID_ARGUMENT  some parts are skeleton rows and others are not
  // `culprit` is set to the shard whose part is at fault, and -1 where that is none alone.
  absl::StatusOr<std::vector<LayerOutput>> CompressShards(std::vector<LayerInput> parts,
                                                          ParallelFor parallel, int64_t* culprit);

  // The pivot, once, as soon as it is known: after the call that made it so. nullopt otherwise.
  std::optional<PivotResult> TakePivot();

  // What layers of skeleton rows are held to. Null until the pivot is known, and where no layer may
  // be one: with EXACT, and with all methods but StructKV and FastKV.
  std::shared_ptr<const Skeleton> skeleton() const;

  // The transition layer + 1 that EXACT would have found, whatever the mode of StructKV. nullopt
  // with other methods, until every layer was answered, where one came as skeleton rows, and where
  // there was nothing to search.
  std::optional<int64_t> ExactPivot() const;

  // Whether every layer was answered.
  bool done() const;

  // Of the last call that compressed a layer, or tried to.
  const StageTimes& stages() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace structkv::engine
