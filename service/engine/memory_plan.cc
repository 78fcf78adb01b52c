#include "service/engine/kv_view.h"
#include "service/engine/layer_skeleton.h"
#include "service/engine/prompt_spec.h"
#include "service/engine/query_heads.h"
#include "service/engine/rerotation.h"
#include "service/method/centrality.h"
#include "service/method/pivot_detector.h"
#include "service/method/selection_policy.h"

namespace structkv::engine {
namespace {

constexpr int64_t kFloat = sizeof(float);
constexpr int64_t kPosition = sizeof(int32_t);

int64_t InputOfOneLayer(const PromptSpec& spec) {
  int64_t bytes = 0;
  for (const InputTensor tensor : spec.RequiredTensors()) bytes += spec.InputBytes(tensor);
  return bytes;
}

int64_t RowsOfOneLayer(const PromptSpec& spec) {
  return spec.KeptBytes(InputTensor::kKeys) + spec.KeptBytes(InputTensor::kValues);
}

int64_t OutputOfOneLayer(const PromptSpec& spec) {
  const int64_t sets = spec.per_kv_head() ? spec.geometry.kv_heads : 1;
  int64_t bytes = sets * spec.largest_kept_tokens() * kPosition + RowsOfOneLayer(spec);
  if (!spec.plan_only) {
    bytes += spec.InputBytes(InputTensor::kKeyScales) + spec.InputBytes(InputTensor::kValueScales);
  }
  if (spec.return_saliency) bytes += sets * spec.prompt_tokens * kFloat;
  return bytes;
}

int64_t State(const PromptSpec& spec) {
  const int64_t per_layer = spec.method.needs_statistics()
                                ? static_cast<int64_t>(sizeof(method::LayerScore))
                                : int64_t{1};
  int64_t bytes = spec.geometry.layers * per_layer + Rerotation::StateBytes(spec);
  if (spec.paged.has_value()) bytes += spec.paged->Blocks(spec.prompt_tokens) * kPosition;
  if (spec.method.has_centrality()) {
    const auto range = method::PossibleCentralities(spec.geometry.layers, spec.method.pivot);
    bytes += method::Centrality::MaxVectors(range.last) * spec.prompt_tokens * kFloat;
  }
  // What layers of skeleton rows are held to.
  if (spec.may_have_skeleton_layers()) {
    bytes += spec.skeleton_tokens() * kPosition;
  }
  bytes += spec.skeleton_tokens() * kPosition;
  return bytes;
}

// What the backend is given of window queries and keys, but for the data.
SaliencyParams ShapesOf(const PromptSpec& spec) {
  const ModelGeometry& geometry = spec.geometry;
  SaliencyParams params;
  params.queries = TensorView::Dense(nullptr, spec.queries(), Layout::kHeadTokenDim,
                                     geometry.query_heads, spec.window_rows(), geometry.key_dim);
  params.keys = KvView(spec, nullptr, geometry.key_dim, spec.prompt_tokens, /*in_order=*/false);
  return TellsQueryHeadsApart(spec) ? OneHeadOf(params) : params;
}

int64_t Scratch(const PromptSpec& spec, const Backend& backend) {
  if (!spec.method.needs_statistics()) return 0;
  const ModelGeometry& geometry = spec.geometry;
  const int64_t tokens = spec.prompt_tokens;
  int64_t bytes = tokens * kFloat;  // the sum over KV heads
  if (spec.statistic == Statistic::kWindowQueries) {
    const SaliencyParams params = ShapesOf(spec);
    bytes += geometry.kv_heads * tokens * kFloat;
    if (TellsQueryHeadsApart(spec)) bytes += params.keys.heads * tokens * kFloat;
    bytes += backend.SaliencyScratchBytes(params);
  }
  const int64_t sets = spec.per_kv_head() ? geometry.kv_heads : 1;
  bytes += method::MakeSelectionPolicy(spec.method)->ScratchFloats(tokens, sets) * kFloat;
  return bytes + LayerSkeletonScratchBytes(spec);
}

}  // namespace

absl::Status CheckRoom(const PromptSpec& spec, const Backend& backend, bool keys_on_device) {
  if (!spec.method.needs_statistics() || spec.statistic != Statistic::kWindowQueries) {
    return absl::OkStatus();
  }
  constexpr float kGiven = 0;  // stands for all of them
  SaliencyParams params = ShapesOf(spec);
  if (spec.window_lse) params.lse = &kGiven;
  return backend.CheckRoom(params, keys_on_device);
}

MemoryPlan PlanMemory(const PromptSpec& spec, const Backend& backend) {
  return {
      .layer_input_bytes = InputOfOneLayer(spec),
      .layer_kv_bytes = spec.InputBytes(InputTensor::kKeys) + spec.InputBytes(InputTensor::kValues),
      .layer_output_bytes = OutputOfOneLayer(spec),
      .layer_rows_bytes = RowsOfOneLayer(spec),
      .state_bytes = State(spec),
      .scratch_bytes = Scratch(spec, backend)};
}

}  // namespace structkv::engine
