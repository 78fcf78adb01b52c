#include "service/engine/prompt.h"

#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "service/engine/layer_saliency.h"
#include "service/engine/layer_skeleton.h"
#include "service/method/centrality.h"
#include "service/method/selection_policy.h"

namespace structkv::engine {
namespace {

const Buffer& TensorOf(const LayerInput& input, InputTensor tensor) {
  switch (tensor) {
    case InputTensor::kKeys:
      return input.keys;
    case InputTensor::kValues:
      return input.values;
    case InputTensor::kWindowQueries:
      return input.window_queries;
    case InputTensor::kWindowLse:
      return input.window_lse;
    case InputTensor::kSaliency:
      return input.saliency;
  }
  return input.keys;
}

}  // namespace

class Prompt::Impl {
 public:
  Impl(PromptSpec spec, const Backend* backend, BufferPool* pool)
      : spec_(std::move(spec)),
        backend_(*backend),
        pool_(*pool),
        policy_(method::MakeSelectionPolicy(spec_.method)),
        answered_(spec_.geometry.layers, false) {
    if (spec_.method.needs_statistics()) metrics_.resize(spec_.geometry.layers);
    if (!spec_.method.has_centrality()) return;
    const auto range = method::PossiblePivots(spec_.geometry.layers, spec_.method.pivot);
    centrality_ = std::make_unique<method::Centrality>(spec_.method.decay, spec_.prompt_tokens,
                                                       range.first, range.last, backend);
  }

  const PromptSpec& spec() const { return spec_; }
  bool done() const { return answered_count_ == spec_.geometry.layers; }

  absl::StatusOr<LayerOutput> CompressLayer(LayerInput input, ParallelFor parallel) {
    absl::Status status = Check(input);
    if (!status.ok()) return status;
    LayerOutput output;
    output.layer = input.layer;
    output.kept_tokens = spec_.kept_tokens(input.layer);
    LayerSaliency saliency;
    if (spec_.method.needs_statistics() && spec_.has_input(input.layer)) {
      absl::StatusOr<LayerSaliency> computed =
          ComputeLayerSaliency(spec_, backend_, pool_, input, parallel);
      if (!computed.ok()) {
        failed_ = true;
        return computed.status();
      }
      saliency = *std::move(computed);
      output.metrics = saliency.metrics;
      metrics_[input.layer] = saliency.metrics;
    }
    Select(saliency, output, parallel);
    if (!spec_.plan_only) {
      output.keys = Kept(std::move(input.keys), spec_.geometry.key_dim, output, parallel);
      output.values = Kept(std::move(input.values), spec_.geometry.value_dim, output, parallel);
    }
    answered_[input.layer] = true;
    ++answered_count_;
    if (centrality_ != nullptr) {
      const auto tokens = static_cast<size_t>(spec_.prompt_tokens);
      centrality_->Add(input.layer, {saliency.sum_scores(), tokens}, parallel);
      DecideIfKnown(parallel);
    } else if (input.layer == spec_.method.skeleton_layer()) {
      pivot_ = LayerSkeleton(spec_, saliency, output.positions, backend_, pool_, parallel);
    }
    if (spec_.return_saliency && spec_.has_input(input.layer)) {
      // Of a single KV head there is one vector, under either name.
      const bool per_head =
          saliency.sum.empty() || (spec_.per_kv_head() && !saliency.per_head.empty());
      output.saliency = std::move(per_head ? saliency.per_head : saliency.sum);
      ScaleReturned(output.saliency.as<float>(), output.saliency.size() / sizeof(float));
    }
    return output;
  }

  std::optional<PivotResult> TakePivot() { return std::exchange(pivot_, std::nullopt); }

 private:
  absl::Status Check(const LayerInput& input) const {
    if (failed_) return absl::FailedPreconditionError("the prompt failed at an earlier layer");
    const int64_t layers = spec_.geometry.layers;
    if (input.layer < 0 || input.layer >= layers) {
      return absl::OutOfRangeError(
          absl::StrCat("layer ", input.layer, ": out of range [0, ", layers - 1, "]"));
    }
    if (answered_[input.layer]) {
      return absl::AlreadyExistsError(
          absl::StrCat("layer ", input.layer, ": was answered already"));
    }
    for (int i = 0; i < kInputTensors; ++i) {
      const auto tensor = static_cast<InputTensor>(i);
      const auto came = static_cast<int64_t>(TensorOf(input, tensor).size());
      const int64_t needed = spec_.has_input(input.layer) ? spec_.InputBytes(tensor) : 0;
      if (came == needed) continue;
      const std::string_view name = InputTensorName(tensor);
      return absl::InvalidArgumentError(
          absl::StrCat("layer ", input.layer, ": ", absl::string_view(name.data(), name.size()),
                       ": ", came, " bytes came, ", needed, " are needed"));
    }
    return absl::OkStatus();
  }

  void Select(const LayerSaliency& saliency, LayerOutput& output, ParallelFor parallel) {
    method::SelectionInput input{
        .tokens = spec_.prompt_tokens, .layer = output.layer, .layers = spec_.geometry.layers};
    switch (policy_->input()) {
      case method::PolicyInput::kNothing:
        break;
      case method::PolicyInput::kSaliency:
        input.scores = saliency.sum_scores();
        break;
      case method::PolicyInput::kPerKvHead:
        input.scores = saliency.head_scores();
        input.heads = spec_.geometry.kv_heads;
        break;
    }
    const int64_t floats = policy_->ScratchFloats(input.tokens, input.heads);
    const Buffer scratch = pool_.Acquire(floats * sizeof(float));
    output.positions.resize(input.heads * output.kept_tokens);
    policy_->Select(input, backend_, parallel, {scratch.as<float>(), static_cast<size_t>(floats)},
                    absl::MakeSpan(output.positions));
  }

  // The mean over a group is its sum over the group's size: the order is the same, so only what is
  // returned is scaled.
  void ScaleReturned(float* values, size_t count) const {
    if (spec_.method.group_reduce != method::GroupReduce::kMean) return;
    const auto group = static_cast<float>(spec_.geometry.group());
    for (size_t i = 0; i < count; ++i) values[i] /= group;
  }

  // The rows of `source` that stay; `source` itself where all do.
  Buffer Kept(Buffer source, int64_t dim, const LayerOutput& output, ParallelFor parallel) {
    const int64_t kept = output.kept_tokens;
    if (kept == spec_.prompt_tokens) return source;
    const int64_t heads = spec_.geometry.kv_heads;
    Buffer rows = pool_.Acquire(heads * kept * dim * DTypeSize(spec_.dtype));
    backend_.Gather(
        TensorView::Dense(source.data(), spec_.dtype, spec_.layout, heads, spec_.prompt_tokens,
                          dim),
        output.positions.data(), spec_.per_kv_head(),
        MutableTensorView::Dense(rows.data(), spec_.dtype, spec_.layout, heads, kept, dim),
        parallel);
    return rows;
  }

  void DecideIfKnown(ParallelFor parallel) {
    const method::PivotSpec& pivot = spec_.method.pivot;
    const bool fixed = pivot.mode == method::PivotMode::kFixed;
    // FIXED looks at the layers up to the pivot alone, so that the order of arrival of later ones
    // leaves no trace in the answer.
    const int64_t needed = fixed ? pivot.fixed_layer + 1 : spec_.geometry.layers;
    while (complete_prefix_ < needed && answered_[complete_prefix_]) ++complete_prefix_;
    if (complete_prefix_ < needed) return;

    PivotResult result;
    const absl::Span<const method::LayerMetrics> seen(metrics_.data(), static_cast<size_t>(needed));
    result.decision = fixed ? method::DecideFixed(seen, pivot) : method::DecideExact(seen, pivot);
    result.centrality = centrality_->Take(result.decision.pivot_layer, parallel);
    centrality_.reset();
    result.skeleton.resize(spec_.skeleton_tokens());
    backend_.Select({.scores = result.centrality.data(),
                     .tokens = spec_.prompt_tokens,
                     .window = spec_.window_rows(),
                     .keep = spec_.skeleton_tokens()},
                    result.skeleton.data());
    if (!spec_.return_centrality) result.centrality = std::vector<float>();
    ScaleReturned(result.centrality.data(), result.centrality.size());
    pivot_ = std::move(result);
  }

  const PromptSpec spec_;
  const Backend& backend_;
  BufferPool& pool_;
  const std::unique_ptr<method::SelectionPolicy> policy_;
  std::vector<bool> answered_;
  int64_t answered_count_ = 0;
  int64_t complete_prefix_ = 0;  // layers 0 .. complete_prefix_ - 1 were answered
  bool failed_ = false;
  std::vector<method::LayerMetrics> metrics_;
  std::unique_ptr<method::Centrality> centrality_;  // until the pivot is known
  std::optional<PivotResult> pivot_;
};

Prompt::Prompt(PromptSpec spec, const Backend* backend, BufferPool* pool)
    : impl_(std::make_unique<Impl>(std::move(spec), backend, pool)) {}
Prompt::~Prompt() = default;

const PromptSpec& Prompt::spec() const { return impl_->spec(); }

absl::StatusOr<LayerOutput> Prompt::CompressLayer(LayerInput input, ParallelFor parallel) {
  return impl_->CompressLayer(std::move(input), parallel);
}

std::optional<PivotResult> Prompt::TakePivot() { return impl_->TakePivot(); }

bool Prompt::done() const { return impl_->done(); }

}  // namespace structkv::engine
