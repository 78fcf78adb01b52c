#include "service/engine/prompt.h"

#include <algorithm>
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
    case InputTensor::kPositions:  // a view, checked by itself
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
    const auto range = method::PossibleCentralities(spec_.geometry.layers, spec_.method.pivot);
    centrality_ = std::make_unique<method::Centrality>(spec_.method.decay, spec_.prompt_tokens,
                                                       range.first, range.last, backend);
  }

  const PromptSpec& spec() const { return spec_; }
  bool done() const { return answered_count_ == spec_.geometry.layers; }

  absl::StatusOr<LayerOutput> CompressLayer(LayerInput input, ParallelFor parallel) {
    absl::Status status = Check(input);
    if (!status.ok()) return status;
    LayerOutput output;
    const bool full = input.positions.empty();
    const int64_t tokens = full ? spec_.prompt_tokens : spec_.skeleton_tokens();
    output.layer = input.layer;
    output.kept_tokens = std::min(spec_.kept_tokens(input.layer), tokens);
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
    Select(saliency, tokens, output, parallel);
    if (!spec_.plan_only) {
      const ModelGeometry& geometry = spec_.geometry;
      output.keys = Kept(std::move(input.keys), geometry.key_dim, tokens, output, parallel);
      output.values = Kept(std::move(input.values), geometry.value_dim, tokens, output, parallel);
    }
    if (!full) {
      for (int32_t& position : output.positions) position = input.positions[position];
      skeleton_came_ = true;
    }
    answered_[input.layer] = true;
    ++answered_count_;
    if (centrality_ != nullptr) {
      centrality_->Add(input.layer, {saliency.sum_scores(), static_cast<size_t>(tokens)}, parallel);
      DecideIfKnown(parallel);
    } else if (input.layer == spec_.method.skeleton_layer()) {
      pivot_ = LayerSkeleton(spec_, saliency, output.positions, backend_, pool_, parallel);
      AllowSkeletonRows();
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
  std::shared_ptr<const Skeleton> skeleton() const { return skeleton_; }

  std::optional<int64_t> ExactPivot() const {
    if (!done() || skeleton_came_ || !spec_.method.has_centrality()) return std::nullopt;
    const method::PivotDecision exact = method::DecideExact(metrics_, spec_.method.pivot);
    if (!exact.transition_layer.has_value()) return std::nullopt;
    return exact.pivot_layer;
  }

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
    absl::Status positions = CheckPositions(input);
    if (!positions.ok()) return positions;
    for (int i = 0; i < kInputTensors; ++i) {
      const auto tensor = static_cast<InputTensor>(i);
      if (tensor == InputTensor::kPositions) continue;
      const auto came = static_cast<int64_t>(TensorOf(input, tensor).size());
      const int64_t needed = !spec_.has_input(input.layer) ? 0
                             : input.positions.empty()     ? spec_.InputBytes(tensor)
                                                           : spec_.SkeletonInputBytes(tensor);
      if (came == needed) continue;
      const std::string_view name = InputTensorName(tensor);
      return absl::InvalidArgumentError(
          absl::StrCat("layer ", input.layer, ": ", absl::string_view(name.data(), name.size()),
                       ": ", came, " bytes came, ", needed, " are needed"));
    }
    return absl::OkStatus();
  }

  absl::Status CheckPositions(const LayerInput& input) const {
    if (input.positions.empty()) return absl::OkStatus();
    if (skeleton_ == nullptr || !skeleton_->from_layer.has_value() ||
        input.layer < *skeleton_->from_layer) {
      return absl::InvalidArgumentError(
          absl::StrCat("layer ", input.layer, ": positions: ",
                       skeleton_ == nullptr ? "the pivot is not decided; full layers are allowed"
                       : skeleton_->from_layer.has_value()
                           ? absl::StrCat("allowed from layer ", *skeleton_->from_layer, " on")
                           : "no layer past the pivot is left; full layers are allowed"));
    }
    if (input.positions != absl::MakeConstSpan(skeleton_->positions)) {
      return absl::InvalidArgumentError(absl::StrCat("layer ", input.layer,
                                                     ": positions: they are not the skeleton of ",
                                                     skeleton_->positions.size(), " tokens"));
    }
    return absl::OkStatus();
  }

  void Select(const LayerSaliency& saliency, int64_t tokens, LayerOutput& output,
              ParallelFor parallel) {
    method::SelectionInput input{.tokens = tokens,
                                 .budget_tokens = spec_.prompt_tokens,
                                 .layer = output.layer,
                                 .layers = spec_.geometry.layers};
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
  Buffer Kept(Buffer source, int64_t dim, int64_t tokens, const LayerOutput& output,
              ParallelFor parallel) {
    const int64_t kept = output.kept_tokens;
    if (kept == tokens) return source;
    const int64_t heads = spec_.geometry.kv_heads;
    Buffer rows = pool_.Acquire(heads * kept * dim * DTypeSize(spec_.dtype));
    backend_.Gather(
        TensorView::Dense(source.data(), spec_.dtype, spec_.layout, heads, tokens, dim),
        output.positions.data(), spec_.per_kv_head(),
        MutableTensorView::Dense(rows.data(), spec_.dtype, spec_.layout, heads, kept, dim),
        parallel);
    return rows;
  }

  // Asks after each layer of the complete prefix in turn, so that the order of arrival leaves no
  // trace in the answer.
  void DecideIfKnown(ParallelFor parallel) {
    const int64_t layers = spec_.geometry.layers;
    while (complete_prefix_ < layers && answered_[complete_prefix_]) {
      ++complete_prefix_;
      std::optional<method::PivotDecision> decision = method::DecideAfter(
          {metrics_.data(), static_cast<size_t>(complete_prefix_)}, layers, spec_.method.pivot);
      if (decision.has_value()) {
        Decide(*std::move(decision), parallel);
        return;
      }
      if (online_) centrality_->NotBelow(complete_prefix_, parallel);
    }
  }

  void Decide(method::PivotDecision decision, ParallelFor parallel) {
    PivotResult result;
    result.decision = std::move(decision);
    result.centrality = centrality_->Take(result.decision.centrality_layer, parallel);
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
    AllowSkeletonRows();
  }

  // Later layers may come as the rows of the pivot's skeleton.
  void AllowSkeletonRows() {
    if (!spec_.may_have_skeleton_layers()) return;
    skeleton_ = std::make_shared<const Skeleton>(
        Skeleton{pivot_->decision.skeleton_from_layer, pivot_->skeleton});
  }

  const PromptSpec spec_;
  const Backend& backend_;
  BufferPool& pool_;
  const std::unique_ptr<method::SelectionPolicy> policy_;
  // The centrality is that of the layer which decides, so that what lies before it is summed up.
  const bool online_ = spec_.method.has_centrality() && spec_.may_have_skeleton_layers() &&
                       !spec_.method.pivot.given_layer();
  std::vector<bool> answered_;
  int64_t answered_count_ = 0;
  int64_t complete_prefix_ = 0;  // layers 0 .. complete_prefix_ - 1 were answered
  bool failed_ = false;
  std::vector<method::LayerMetrics> metrics_;
  std::unique_ptr<method::Centrality> centrality_;  // until the pivot is known
  std::optional<PivotResult> pivot_;
  std::shared_ptr<const Skeleton> skeleton_;  // once the pivot is known
  bool skeleton_came_ = false;                // a layer came as skeleton rows
};

Prompt::Prompt(PromptSpec spec, const Backend* backend, BufferPool* pool)
    : impl_(std::make_unique<Impl>(std::move(spec), backend, pool)) {}
Prompt::~Prompt() = default;

const PromptSpec& Prompt::spec() const { return impl_->spec(); }

absl::StatusOr<LayerOutput> Prompt::CompressLayer(LayerInput input, ParallelFor parallel) {
  return impl_->CompressLayer(std::move(input), parallel);
}

std::optional<PivotResult> Prompt::TakePivot() { return impl_->TakePivot(); }

std::shared_ptr<const Skeleton> Prompt::skeleton() const { return impl_->skeleton(); }

std::optional<int64_t> Prompt::ExactPivot() const { return impl_->ExactPivot(); }

bool Prompt::done() const { return impl_->done(); }

}  // namespace structkv::engine
