#include "service/engine/prompt.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "service/engine/kv_view.h"
#include "service/engine/layer_saliency.h"
#include "service/engine/layer_skeleton.h"
#include "service/engine/rerotation.h"
#include "service/engine/shard_saliency.h"
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
    case InputTensor::kKeyScales:
      return input.key_scales;
    case InputTensor::kValueScales:
      return input.value_scales;
    case InputTensor::kSaliency:
    case InputTensor::kPositions:  // a view, checked by itself
      return input.saliency;
  }
  return input.keys;
}

// Scales are factors: NaN fails too, and so does a key scale that scores cannot be multiplied by.
// `first_head`: of the model's KV heads, the input's first.
absl::Status CheckScales(const PromptSpec& spec, const LayerInput& input, InputTensor tensor,
                         int64_t first_head) {
  const Buffer& buffer = TensorOf(input, tensor);
  const auto* scales = buffer.as<const float>();
  const bool scored =
      tensor == InputTensor::kKeyScales && spec.statistic == Statistic::kWindowQueries;
  const double factor = scored ? spec.attention_scale.value_or(1) : 1;
  for (size_t i = 0; i < buffer.size() / sizeof(float); ++i) {
    if (scales[i] > 0 && std::isfinite(scales[i]) &&
        std::isfinite(static_cast<float>(factor * scales[i]))) {
      continue;
    }
    const std::string_view name = InputTensorName(tensor);
    return absl::InvalidArgumentError(absl::StrCat(
        "layer ", input.layer, ": ", absl::string_view(name.data(), name.size()), ": that of ",
        spec.kv_scales == KvScales::kPerTensor
            ? "every KV head"
            : absl::StrCat("KV head ", first_head + static_cast<int64_t>(i)),
        " is ", std::isnan(scales[i]) ? NAN : scales[i], "; a finite number above 0 is needed",
        factor == 1 ? "" : absl::StrCat(", times attention_scale (", factor, ") too")));
  }
  return absl::OkStatus();
}

}  // namespace

class Prompt::Impl {
 public:
  Impl(PromptSpec spec, const Backend* backend, BufferPool* pool, std::vector<Shard> shards)
      : spec_(std::move(spec)),
        shards_(std::move(shards)),
        backend_(*backend),
        pool_(*pool),
        policy_(method::MakeSelectionPolicy(spec_.method)),
        answered_(spec_.geometry.layers, false) {
    for (const Shard& shard : shards_) part_specs_.push_back(ShardSpec(spec_, shard));
    if (shards_.empty()) part_specs_.push_back(spec_);
    if (spec_.rotary.has_value()) rerotation_.emplace(spec_);
    if (spec_.method.needs_statistics()) metrics_.resize(spec_.geometry.layers);
    if (!spec_.method.has_centrality()) return;
    const auto range = method::PossibleCentralities(spec_.geometry.layers, spec_.method.pivot);
    centrality_ = std::make_unique<method::Centrality>(spec_.method.decay, spec_.prompt_tokens,
                                                       range.first, range.last, backend);
  }

  const PromptSpec& spec() const { return spec_; }
  bool done() const { return answered_count_ == spec_.geometry.layers; }

  absl::StatusOr<std::vector<LayerOutput>> Compress(absl::Span<LayerInput> parts,
                                                    ParallelFor parallel, int64_t* culprit) {
    if (absl::Status status = CheckParts(parts, culprit); !status.ok()) return status;
    const LayerInput& first = parts[0];
    LayerOutput whole;
    const bool full = first.positions.empty();
    const int64_t tokens = full ? spec_.prompt_tokens : spec_.skeleton_tokens();
    whole.layer = first.layer;
    whole.kept_tokens = std::min(spec_.kept_tokens(whole.layer), tokens);
    LayerSaliency saliency;
    if (spec_.method.needs_statistics() && spec_.has_input(whole.layer)) {
      absl::StatusOr<LayerSaliency> computed =
          shards_.empty()
              ? ComputeLayerSaliency(spec_, backend_, pool_, parts[0], parallel)
              : ComputeShardedSaliency(spec_, backend_, pool_, shards_, parts, parallel, culprit);
      if (!computed.ok()) {
        failed_ = true;
        return computed.status();
      }
      saliency = *std::move(computed);
      whole.metrics = saliency.metrics;
      metrics_[whole.layer] = saliency.metrics;
    }
    Select(saliency, tokens, whole, parallel);
    std::vector<LayerOutput> outputs(parts.size());
    for (size_t i = 0; i < parts.size(); ++i) {
      TakePart(i, whole, &outputs[i]);
      if (spec_.plan_only) continue;
      absl::Status compacted = Compact(i, parts[i], tokens, outputs[i], parallel);
      if (compacted.ok()) continue;
      failed_ = true;
      return compacted;
    }
    if (!full) {
      skeleton_came_ = true;
      for (LayerOutput& output : outputs) {
        for (int32_t& position : output.positions) position = first.positions[position];
      }
    }
    answered_[whole.layer] = true;
    ++answered_count_;
    if (centrality_ != nullptr) {
      centrality_->Add(whole.layer, {saliency.sum_scores(), static_cast<size_t>(tokens)}, parallel);
      DecideIfKnown(parallel);
    } else if (whole.layer == spec_.method.skeleton_layer()) {
      // GemFilter's choice, which all parts share.
      pivot_ = LayerSkeleton(spec_, saliency, outputs[0].positions, backend_, pool_, parallel);
      AllowSkeletonRows();
    }
    if (spec_.return_saliency && spec_.has_input(whole.layer)) {
      ReturnSaliency(std::move(saliency), tokens, outputs);
    }
    if (absl::Status health = backend_.Health(); !health.ok()) {
      failed_ = true;
      return health;
    }
    return outputs;
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
  absl::Status CheckParts(absl::Span<const LayerInput> parts, int64_t* culprit) const {
    if (parts.size() != part_specs_.size()) {
      return absl::InvalidArgumentError(absl::StrCat(parts.size(), " parts of a layer came; ",
                                                     part_specs_.size(), " are needed"));
    }
    for (size_t i = 0; i < parts.size(); ++i) {
      absl::Status status =
          Check(parts[i], part_specs_[i], shards_.empty() ? 0 : shards_[i].kv_heads.begin);
      if (!status.ok()) {
        *culprit = static_cast<int64_t>(i);
        return status;
      }
      if (parts[i].layer != parts[0].layer) {
        return absl::InvalidArgumentError(absl::StrCat("parts of layers ", parts[0].layer, " and ",
                                                       parts[i].layer, " came together"));
      }
      if (parts[i].positions.empty() == parts[0].positions.empty()) continue;
      const bool first = parts[i].positions.empty();
      return absl::InvalidArgumentError(absl::StrCat(
          "layer ", parts[0].layer, ": shard ", first ? 0 : i, " sent skeleton rows and shard ",
          first ? i : 0, " all tokens; all shards must send the same"));
    }
    return absl::OkStatus();
  }

  // `spec`: with the heads that the input has, of which `first_head` is the first.
  absl::Status Check(const LayerInput& input, const PromptSpec& spec, int64_t first_head) const {
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
                             : input.positions.empty()     ? spec.InputBytes(tensor)
                                                           : spec.SkeletonInputBytes(tensor);
      if (came == needed) continue;
      const std::string_view name = InputTensorName(tensor);
      return absl::InvalidArgumentError(
          absl::StrCat("layer ", input.layer, ": ", absl::string_view(name.data(), name.size()),
                       ": ", came, " bytes came, ", needed, " are needed"));
    }
    absl::Status scales = CheckScales(spec_, input, InputTensor::kKeyScales, first_head);
    scales.Update(CheckScales(spec_, input, InputTensor::kValueScales, first_head));
    return scales;
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

  // What part `index` answers of the whole layer's choice.
  void TakePart(size_t index, LayerOutput& whole, LayerOutput* part) const {
    if (shards_.empty()) {
      *part = std::move(whole);
      return;
    }
    part->layer = whole.layer;
    part->kept_tokens = whole.kept_tokens;
    part->metrics = whole.metrics;
    const HeadRange heads = spec_.per_kv_head() ? shards_[index].kv_heads : HeadRange{0, 1};
    const auto begin = whole.positions.begin() + heads.begin * whole.kept_tokens;
    part->positions.assign(begin, begin + heads.count * whole.kept_tokens);
  }

  // The kept rows of part `index`, but those that are pulled.
  absl::Status Compact(size_t index, LayerInput& input, int64_t tokens, LayerOutput& output,
                       ParallelFor parallel) {
    const ModelGeometry& geometry = spec_.geometry;
    const HeadRange heads = shards_.empty() ? HeadRange{0, geometry.kv_heads}  // all
                                            : shards_[index].kv_heads;
    output.key_scales = std::move(input.key_scales);
    output.value_scales = std::move(input.value_scales);
    if (spec_.paged.has_value()) output.kept_blocks = spec_.paged->Blocks(output.kept_tokens);
    const auto keep = [&](Buffer source, Buffer room, int64_t dim, const RotationParams* rotation,
                          Buffer* rows) {
      const TensorView all = KvView(part_specs_[index], source.data(), dim, tokens,
                                    /*in_order=*/!input.positions.empty());
      absl::StatusOr<Buffer> kept =
          Kept(heads, all, std::move(source), std::move(room), output, parallel, rotation);
      if (kept.ok()) *rows = *std::move(kept);
      return kept.status();
    };
    if (!spec_.pulls(InputTensor::kKeys)) {
      std::optional<LayerRotation> turned;
      if (rerotation_.has_value()) {
        turned =
            rerotation_->ForLayer(output.positions, output.kept_tokens, tokens, input.positions);
      }
      absl::Status status =
          keep(std::move(input.keys), std::move(input.key_room), geometry.key_dim,
               turned.has_value() && turned->moves ? &turned->params : nullptr, &output.keys);
      if (!status.ok()) return status;
    }
    if (spec_.pulls(InputTensor::kValues) || geometry.values_in_keys) return absl::OkStatus();
    return keep(std::move(input.values), std::move(input.value_room), geometry.value_dim, nullptr,
                &output.values);
  }

  void ReturnSaliency(LayerSaliency saliency, int64_t tokens, std::vector<LayerOutput>& outputs) {
    // Of a single KV head there is one vector, under either name.
    const bool per_head =
        saliency.sum.empty() || (spec_.per_kv_head() && !saliency.per_head.empty());
    Buffer& all = per_head ? saliency.per_head : saliency.sum;
    ScaleReturned(all.as<float>(), all.size() / sizeof(float));
    if (shards_.empty()) {
      outputs[0].saliency = std::move(all);
      return;
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      const HeadRange heads = spec_.per_kv_head() ? shards_[i].kv_heads : HeadRange{0, 1};
      outputs[i].saliency =
          pool_.Acquire(static_cast<size_t>(heads.count * tokens) * sizeof(float));
      std::copy_n(all.as<const float>() + heads.begin * tokens, heads.count * tokens,
                  outputs[i].saliency.as<float>());
    }
  }

  // A sum is a mean times the number of what it is over: the order is the same, so only what is
  // returned is scaled.
  void ScaleReturned(float* values, size_t count) const {
    if (spec_.method.window_reduce == method::WindowReduce::kSum) {
      const auto rows = static_cast<float>(spec_.window_rows());
      for (size_t i = 0; i < count; ++i) values[i] *= rows;
    }
    if (spec_.method.group_reduce == method::GroupReduce::kMean) {
      const auto group = static_cast<float>(spec_.geometry.group());
      for (size_t i = 0; i < count; ++i) values[i] /= group;
    }
  }

  // The rows of `all`, a view of `source` with those KV heads, that stay, in `room` where there is
  // any; of a dense tensor `source` itself where all do, unless it is lent. `rotation`: they are
  // keys to be turned; null: nothing is to be.
  absl::StatusOr<Buffer> Kept(const HeadRange& heads, const TensorView& all, Buffer source,
                              Buffer room, const LayerOutput& output, ParallelFor parallel,
                              const RotationParams* rotation) {
    const int64_t kept = output.kept_tokens;
    const std::vector<HeadRange> runs = DecodeRuns(spec_, heads);
    const bool own = !source.is_lent() && room.empty();
    if (own && kept == all.tokens && runs.size() == 1 && !all.paged() && rotation == nullptr) {
      return source;
    }
    const auto element = static_cast<int64_t>(DTypeSize(spec_.dtype));
    const int64_t head_bytes = spec_.kv_slots(kept) * all.dim * element;
    Buffer rows = room.empty() ? pool_.Acquire(heads.count * head_bytes) : std::move(room);
    rows.Truncate(static_cast<size_t>(heads.count * head_bytes));
    for (const HeadRange& run : runs) {
      TensorView from = all;
      from.data = source.data() + run.begin * all.head_stride * element;
      from.heads = run.count;
      const int64_t before = (spec_.per_kv_head() ? run.begin : 0) * kept;
      const int32_t* positions = output.positions.data() + before;
      const absl::StatusOr<MutableTensorView> to =
          Room(rows.data() + run.begin * head_bytes, run.count, kept, all.dim);
      absl::Status status = to.status();
      if (status.ok() && rotation == nullptr) {
        status = backend_.Gather(from, positions, spec_.per_kv_head(), *to, parallel);
      } else if (status.ok()) {
        RotationParams params = *rotation;
        params.positions += before;
        status =
            backend_.GatherRotated(from, positions, spec_.per_kv_head(), params, *to, parallel);
      }
      if (!status.ok()) return status;
    }
    return rows;
  }

  // Room for kept rows of `heads`; what of it lies behind the last row is set to zero.
  absl::StatusOr<MutableTensorView> Room(std::byte* data, int64_t heads, int64_t kept,
                                         int64_t dim) const {
    if (!spec_.paged.has_value()) {
      return MutableTensorView::Dense(data, spec_.dtype, spec_.layout, heads, kept, dim);
    }
    const int64_t block_tokens = spec_.paged->block_tokens;
    const int64_t in_whole_blocks = kept / block_tokens * block_tokens;
    const auto slot = heads * dim * static_cast<int64_t>(DTypeSize(spec_.dtype));
    absl::Status status = backend_.Zero(data + in_whole_blocks * slot,
                                        (spec_.kv_slots(kept) - in_whole_blocks) * slot);
    if (!status.ok()) return status;
    return MutableTensorView::Paged(data, spec_.dtype, spec_.layout, heads, kept, dim,
                                    block_tokens);
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
  const std::vector<Shard> shards_;     // empty: one part holds all heads
  std::vector<PromptSpec> part_specs_;  // with each part's heads
  const Backend& backend_;
  BufferPool& pool_;
  const std::unique_ptr<method::SelectionPolicy> policy_;
  std::optional<Rerotation> rerotation_;  // where kept keys are turned
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

Prompt::Prompt(PromptSpec spec, const Backend* backend, BufferPool* pool, std::vector<Shard> shards)
    : impl_(std::make_unique<Impl>(std::move(spec), backend, pool, std::move(shards))) {}
Prompt::~Prompt() = default;

const PromptSpec& Prompt::spec() const { return impl_->spec(); }

absl::StatusOr<LayerOutput> Prompt::CompressLayer(LayerInput input, ParallelFor parallel) {
  int64_t culprit = -1;
  absl::StatusOr<std::vector<LayerOutput>> outputs =
      impl_->Compress(absl::MakeSpan(&input, 1), parallel, &culprit);
  if (!outputs.ok()) return outputs.status();
  return std::move(outputs->front());
}

absl::StatusOr<std::vector<LayerOutput>> Prompt::CompressShards(std::vector<LayerInput> parts,
                                                                ParallelFor parallel,
                                                                int64_t* culprit) {
  *culprit = -1;
  return impl_->Compress(absl::MakeSpan(parts), parallel, culprit);
}

std::optional<PivotResult> Prompt::TakePivot() { return impl_->TakePivot(); }

std::shared_ptr<const Skeleton> Prompt::skeleton() const { return impl_->skeleton(); }

std::optional<int64_t> Prompt::ExactPivot() const { return impl_->ExactPivot(); }

bool Prompt::done() const { return impl_->done(); }

}  // namespace structkv::engine
