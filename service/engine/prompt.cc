#include "service/engine/prompt.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/layer_pass.h"
#include "service/engine/check_layer.h"
#include "service/engine/kept_rows.h"
#include "service/engine/kv_view.h"
#include "service/engine/layer_saliency.h"
#include "service/engine/layer_skeleton.h"
#include "service/engine/query_heads.h"
#include "service/engine/rerotation.h"
#include "service/engine/shard_saliency.h"
#include "service/method/centrality.h"
#include "service/method/selection_policy.h"

namespace structkv::engine {

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
  }

  const PromptSpec& spec() const { return spec_; }
  bool done() const { return answered_count_ == spec_.geometry.layers; }
  const StageTimes& stages() const { return stages_; }

  absl::StatusOr<std::vector<LayerOutput>> Compress(absl::Span<LayerInput> parts,
                                                    ParallelFor parallel, int64_t* culprit) {
    stages_ = {};
    if (absl::Status status = CheckParts(parts, culprit); !status.ok()) return status;
    const LayerInput& first = parts[0];
    LayerOutput whole;
    const bool full = first.positions.empty();
    const int64_t tokens = TokensOf(first);
    whole.layer = first.layer;
    whole.kept_tokens = std::min(spec_.kept_tokens(whole.layer), tokens);
    if (awaits_pivot_ && centrality_ == nullptr) MakeCentrality(first);
    LayerSaliency saliency;
    Planned planned;
    const StageTimes::Clock::time_point begin = StageTimes::Clock::now();
    const absl::StatusOr<bool> passed =
        TryPass(parts[0], tokens, whole, &saliency, &planned, parallel);
    absl::Status status = passed.status();
    parts[0].staged.reset();  // the steps make no use of it, and its memory is wanted
    if (!passed.ok() || *passed) stages_.Add(Stage::kLayerPass, StageTimes::Clock::now() - begin);
    if (status.ok() && !*passed) {
      status = TakeSteps(parts, tokens, whole, &saliency, parallel, culprit);
    }
    std::vector<LayerOutput> outputs(parts.size());
    for (size_t i = 0; status.ok() && i < parts.size(); ++i) {
      TakePart(i, whole, &outputs[i]);
      if (spec_.plan_only) continue;
      const StageTimer timer(&stages_, Stage::kGather);
      status = Compact(i, parts[i], tokens, std::exchange(planned, {}), outputs[i], parallel);
    }
    if (!status.ok()) {
      failed_ = true;
      return status;
    }
    if (!full) {
      skeleton_came_ = true;
      for (LayerOutput& output : outputs) {
        for (int32_t& position : output.positions) position = first.positions[position];
      }
    }
    answered_[whole.layer] = true;
    ++answered_count_;
    if (awaits_pivot_) {
      const StageTimer timer(&stages_, Stage::kCentrality);
      status =
          *passed && IsResident()
              ? centrality_->Came(whole.layer, parallel)
              : centrality_->Add(whole.layer, {saliency.sum_scores(), static_cast<size_t>(tokens)},
                                 parallel);
      if (status.ok()) status = DecideIfKnown(parallel);
    } else if (whole.layer == spec_.method.skeleton_layer()) {
      // GemFilter's choice, which all parts share.
      const StageTimer timer(&stages_, Stage::kSelect);
      pivot_ = LayerSkeleton(spec_, saliency, outputs[0].positions, backend_, pool_, parallel);
      AllowSkeletonRows();
    }
    if (spec_.return_saliency && spec_.has_input(whole.layer)) {
      ReturnSaliency(std::move(saliency), tokens, outputs);
    }
    if (status.ok()) status = backend_.Health();
    if (!status.ok()) {
      failed_ = true;
      return status;
    }
    return outputs;
  }

  // Looks at nothing that compressing a layer changes, but for `gpu_`.
  void Stage(LayerInput* input) const {
    if (input->staged != nullptr || !PassOf(input->layer, TokensOf(*input)).has_value()) return;
    input->staged = backend_.Stage(ScoredLayer(spec_, *input).params(), gpu_.load());
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
    absl::Status status = CheckPositions(input, skeleton_.get());
    if (status.ok()) status = CheckTensors(input, spec, first_head);
    return status;
  }

  // Rows that stay and were planned before the layer was computed.
  struct Planned {
    std::optional<KeptRows> keys;
    std::optional<KeptRows> values;
    bool gathered = false;  // they are in place
  };

  int64_t TokensOf(const LayerInput& input) const {
    return input.positions.empty() ? spec_.prompt_tokens : spec_.skeleton_tokens();
  }

  // What a layer selects where the backend can compute it in one call and nothing comes between the
  // steps; nothing where they are to be taken one by one.
  std::optional<method::TopScoresParams> PassOf(int64_t layer, int64_t tokens) const {
    if (!backend_.capabilities().whole_layers || !shards_.empty() ||
        spec_.statistic != Statistic::kWindowQueries || !spec_.has_input(layer) ||
        TellsQueryHeadsApart(spec_)) {
      return std::nullopt;
    }
    return policy_->TopScores(SelectionOf(layer, tokens));
  }

  // Where layers go to the backend whole, on the GPU that the first of them is computed on.
  void MakeCentrality(const LayerInput& input) {
    const auto range = method::PossibleCentralities(spec_.geometry.layers, spec_.method.pivot);
    const int64_t count = method::Centrality::MaxVectors(range.last);
    const int64_t tokens = spec_.prompt_tokens;
    std::unique_ptr<ResidentVectors> vectors =
        PassOf(input.layer, TokensOf(input)).has_value()
            ? backend_.Resident(count, tokens, input.keys.data(), input.staged.get())
            : HostVectors(count, tokens, backend_);
    gpu_ = vectors->gpu();
    centrality_ = std::make_unique<method::Centrality>(spec_.method.decay, range.first, range.last,
                                                       std::move(vectors));
  }

  // Whether layers that are computed in one call leave their saliency on a GPU.
  bool IsResident() const { return awaits_pivot_ && centrality_->resident()->gpu() >= 0; }

  // Has the backend compute the layer in one call, where it does that and nothing comes between the
  // steps. False: they are to be taken one by one.
  absl::StatusOr<bool> TryPass(LayerInput& input, int64_t tokens, LayerOutput& whole,
                               LayerSaliency* saliency, Planned* planned, ParallelFor parallel) {
    const std::optional<method::TopScoresParams> top = PassOf(whole.layer, tokens);
    if (!top.has_value()) return false;
    const method::SelectionInput selection = SelectionOf(whole.layer, tokens);
    LayerPass pass = {.top_count = TopCount(spec_, tokens),
                      .per_head = policy_->input() == method::PolicyInput::kPerKvHead,
                      .pooling = top->pooling,
                      .pooling_kernel = top->pooling_kernel,
                      .window = top->window,
                      .keep = top->keep,
                      .staged = input.staged.get()};
    if (absl::Status status = PlanRows(input, tokens, whole.kept_tokens, planned, &pass);
        !status.ok()) {
      return status;
    }
    if (IsResident()) {
      if (const auto place = centrality_->PlaceOf(whole.layer); place.has_value()) {
        pass.resident = centrality_->resident();
        pass.resident_to = *place;
      }
    }
    // What the host wants of the saliency crosses the bus.
    if ((spec_.return_saliency && !spec_.per_kv_head()) || (awaits_pivot_ && !IsResident())) {
      saliency->sum = pool_.Acquire(tokens * sizeof(float));
      pass.sum = saliency->sum.as<float>();
    }
    if (whole.layer == spec_.method.skeleton_layer() ||
        (spec_.return_saliency && spec_.per_kv_head())) {
      saliency->per_head = pool_.Acquire(spec_.geometry.kv_heads * tokens * sizeof(float));
      pass.heads = saliency->per_head.as<float>();
    }
    whole.positions.resize(selection.heads * whole.kept_tokens);
    pass.positions = whole.positions.data();
    SaliencySums sums;
    pass.sums = &sums;
    const ScoredLayer scored(spec_, input);
    pass.saliency = scored.params();
    BadStatistic bad{.head = ScoredLayer::kNoHead};
    absl::Status status = backend_.RunLayer(pass, &bad, parallel);
    if (absl::IsUnimplemented(status)) {
      *saliency = {};
      return false;
    }
    if (!status.ok()) {
      return ScoredLayer::Named(std::move(status), input, /*first_head=*/0, bad);
    }
    planned->gathered = true;
    absl::StatusOr<method::LayerMetrics> metrics = MetricsOf(spec_, whole.layer, tokens, sums);
    if (!metrics.ok()) return metrics.status();
    saliency->metrics = *metrics;
    Note(*saliency, whole);
    return true;
  }

  // Adds the rows that stay to the pass, but those that need the positions first.
  absl::Status PlanRows(LayerInput& input, int64_t tokens, int64_t kept, Planned* planned,
                        LayerPass* pass) {
    if (spec_.plan_only) return absl::OkStatus();
    const auto plan = [&](const Buffer& source, Buffer& room, int64_t dim,
                          std::optional<KeptRows>* rows) -> absl::Status {
      const KeptTensor tensor = KeptOf(0, source, dim, tokens, input, kept, /*turned=*/false);
      if (StaysWhole(spec_, tensor, source, room)) return absl::OkStatus();
      absl::StatusOr<KeptRows> made =
          KeptRows::Plan(spec_, backend_, pool_, tensor, std::move(room));
      if (!made.ok()) return made.status();
      pass->rows.insert(pass->rows.end(), made->runs().begin(), made->runs().end());
      *rows = *std::move(made);
      return absl::OkStatus();
    };
    const ModelGeometry& geometry = spec_.geometry;
    absl::Status status;
    if (!spec_.pulls(InputTensor::kKeys) && !rerotation_.has_value()) {
      status = plan(input.keys, input.key_room, geometry.key_dim, &planned->keys);
    }
    if (status.ok() && !spec_.pulls(InputTensor::kValues) && !geometry.values_in_keys) {
      status = plan(input.values, input.value_room, geometry.value_dim, &planned->values);
    }
    return status;
  }

  absl::Status TakeSteps(absl::Span<LayerInput> parts, int64_t tokens, LayerOutput& whole,
                         LayerSaliency* saliency, ParallelFor parallel, int64_t* culprit) {
    if (spec_.method.needs_statistics() && spec_.has_input(whole.layer)) {
      const StageTimer timer(&stages_, Stage::kSaliency);
      absl::StatusOr<LayerSaliency> computed =
          shards_.empty()
              ? ComputeLayerSaliency(spec_, backend_, pool_, parts[0], parallel)
              : ComputeShardedSaliency(spec_, backend_, pool_, shards_, parts, parallel, culprit);
      if (!computed.ok()) return computed.status();
      *saliency = *std::move(computed);
      Note(*saliency, whole);
    }
    const StageTimer timer(&stages_, Stage::kSelect);
    Select(*saliency, tokens, whole, parallel);
    return absl::OkStatus();
  }

  void Note(const LayerSaliency& saliency, LayerOutput& whole) {
    whole.metrics = saliency.metrics;
    metrics_[whole.layer] = saliency.metrics;
  }

  // But for the scores.
  method::SelectionInput SelectionOf(int64_t layer, int64_t tokens) const {
    const bool per_head = policy_->input() == method::PolicyInput::kPerKvHead;
    return {.tokens = tokens,
            .budget_tokens = spec_.prompt_tokens,
            .heads = per_head ? spec_.geometry.kv_heads : 1,
            .layer = layer,
            .layers = spec_.geometry.layers};
  }

  void Select(const LayerSaliency& saliency, int64_t tokens, LayerOutput& output,
              ParallelFor parallel) {
    method::SelectionInput input = SelectionOf(output.layer, tokens);
    switch (policy_->input()) {
      case method::PolicyInput::kNothing:
        break;
      case method::PolicyInput::kSaliency:
        input.scores = saliency.sum_scores();
        break;
      case method::PolicyInput::kPerKvHead:
        input.scores = saliency.head_scores();
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
  absl::Status Compact(size_t index, LayerInput& input, int64_t tokens, Planned planned,
                       LayerOutput& output, ParallelFor parallel) {
    const ModelGeometry& geometry = spec_.geometry;
    output.key_scales = std::move(input.key_scales);
    output.value_scales = std::move(input.value_scales);
    if (spec_.paged.has_value()) output.kept_blocks = spec_.paged->Blocks(output.kept_tokens);
    const auto keep = [&](Buffer source, Buffer room, int64_t dim, std::optional<KeptRows> rows,
                          const RotationParams* rotation, Buffer* kept) -> absl::Status {
      const bool gathered = rows.has_value() && planned.gathered;
      if (!rows.has_value()) {
        const KeptTensor tensor = KeptOf(index, source, dim, tokens, input, output.kept_tokens,
                                         /*turned=*/rotation != nullptr);
        if (StaysWhole(spec_, tensor, source, room)) {
          *kept = std::move(source);
          return absl::OkStatus();
        }
        absl::StatusOr<KeptRows> made =
            KeptRows::Plan(spec_, backend_, pool_, tensor, std::move(room));
        if (!made.ok()) return made.status();
        rows = *std::move(made);
      }
      if (!gathered) {
        absl::Status status =
            rows->Gather(spec_, backend_, output.positions.data(), rotation, parallel);
        if (!status.ok()) return status;
      }
      *kept = std::move(*rows).Take();
      return absl::OkStatus();
    };
    if (!spec_.pulls(InputTensor::kKeys)) {
      std::optional<LayerRotation> turned;
      if (rerotation_.has_value()) {
        turned =
            rerotation_->ForLayer(output.positions, output.kept_tokens, tokens, input.positions);
      }
      absl::Status status =
          keep(std::move(input.keys), std::move(input.key_room), geometry.key_dim,
               std::move(planned.keys),
               turned.has_value() && turned->moves ? &turned->params : nullptr, &output.keys);
      if (!status.ok()) return status;
    }
    if (spec_.pulls(InputTensor::kValues) || geometry.values_in_keys) return absl::OkStatus();
    return keep(std::move(input.values), std::move(input.value_room), geometry.value_dim,
                std::move(planned.values), nullptr, &output.values);
  }

  // Keys or values of part `index`, of which `kept` rows of each head stay.
  KeptTensor KeptOf(size_t index, const Buffer& source, int64_t dim, int64_t tokens,
                    const LayerInput& input, int64_t kept, bool turned) const {
    return {.heads = shards_.empty() ? HeadRange{0, spec_.geometry.kv_heads}  // all
                                     : shards_[index].kv_heads,
            .all = KvView(part_specs_[index], source.data(), dim, tokens,
                          /*in_order=*/!input.positions.empty()),
            .kept = kept,
            .turned = turned};
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

  // Asks after each layer of the complete prefix in turn, so that the order of arrival leaves no
  // trace in the answer.
  absl::Status DecideIfKnown(ParallelFor parallel) {
    const int64_t layers = spec_.geometry.layers;
    absl::Status status;
    while (status.ok() && complete_prefix_ < layers && answered_[complete_prefix_]) {
      ++complete_prefix_;
      std::optional<method::PivotDecision> decision = method::DecideAfter(
          {metrics_.data(), static_cast<size_t>(complete_prefix_)}, layers, spec_.method.pivot);
      if (decision.has_value()) return Decide(*std::move(decision), parallel);
      if (online_) status = centrality_->NotBelow(complete_prefix_, parallel);
    }
    return status;
  }

  absl::Status Decide(method::PivotDecision decision, ParallelFor parallel) {
    PivotResult result;
    result.decision = std::move(decision);
    absl::Status status = centrality_->Finish(result.decision.centrality_layer, parallel);
    if (!status.ok()) return status;
    result.skeleton.resize(spec_.skeleton_tokens());
    status = centrality_->Select({.tokens = spec_.prompt_tokens,
                                  .window = spec_.window_rows(),
                                  .keep = spec_.skeleton_tokens()},
                                 result.skeleton.data());
    if (status.ok() && spec_.return_centrality) {
      result.centrality.resize(static_cast<size_t>(spec_.prompt_tokens));
      status = centrality_->Read(result.centrality.data());
      ScaleReturned(result.centrality.data(), result.centrality.size());
    }
    if (!status.ok()) return status;
    awaits_pivot_ = false;
    centrality_.reset();
    gpu_ = -1;
    pivot_ = std::move(result);
    AllowSkeletonRows();
    return absl::OkStatus();
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
  StageTimes stages_;  // of the last layer
  std::vector<method::LayerMetrics> metrics_;
  bool awaits_pivot_ = spec_.method.has_centrality();  // until it is known
  std::unique_ptr<method::Centrality> centrality_;     // from the first layer until then
  std::atomic<int> gpu_ = -1;                          // where its vectors lie; read by Stage()
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

void Prompt::Stage(LayerInput* input) const { impl_->Stage(input); }

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

const StageTimes& Prompt::stages() const { return impl_->stages(); }

}  // namespace structkv::engine
