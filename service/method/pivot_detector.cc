#include "service/method/pivot_detector.h"

#include <algorithm>
#include <cmath>

namespace structkv::method {
namespace {

// Layers in which the transition is searched; empty where first > last.
struct SearchRange {
  int64_t first = 0;
  int64_t last = -1;
};

// Shares such as 0.3 of 10 must not lose a layer to the rounding of their product.
constexpr double kSlack = 1e-9;

SearchRange RangeFor(int64_t layers, const PivotSpec& spec) {
  const double depth = static_cast<double>(layers);
  SearchRange range;
  range.first =
      std::max<int64_t>(1, static_cast<int64_t>(std::ceil(spec.search_begin * depth - kSlack)));
  range.last = std::min<int64_t>(
      layers - 2, static_cast<int64_t>(std::floor(spec.search_end * depth + kSlack)));
  return range;
}

// The layer after which ONLINE answers at the latest; `range` is not empty.
int64_t DeadlineLayer(int64_t layers, const SearchRange& range, const PivotSpec& spec) {
  const double share = spec.deadline_share() * static_cast<double>(layers);
  return std::clamp(static_cast<int64_t>(std::floor(share + kSlack)), range.first, layers - 1);
}

// The layer of the highest score in the range, among those seen; the lowest at a tie.
int64_t BestLayer(const std::vector<LayerScore>& layers, const SearchRange& range) {
  const int64_t last = std::min(range.last, static_cast<int64_t>(layers.size()) - 1);
  int64_t best = range.first;
  for (int64_t l = range.first + 1; l <= last; ++l) {
    if (*layers[l].transition > *layers[best].transition) best = l;
  }
  return best;
}

// Adds weight * dx(l) / max |dx| to scores[l], for l >= 1. Nothing where all gradients are 0.
void AddNormalisedGradient(absl::Span<const double> x, double weight, std::vector<double>& scores) {
  double largest = 0;
  for (size_t l = 1; l < x.size(); ++l) largest = std::max(largest, std::abs(x[l] - x[l - 1]));
  if (largest == 0) return;
  for (size_t l = 1; l < x.size(); ++l) scores[l] += weight * ((x[l] - x[l - 1]) / largest);
}

std::vector<LayerScore> Scored(absl::Span<const LayerMetrics> metrics, const PivotSpec& spec) {
  const std::vector<std::optional<double>> transitions = TransitionScores(metrics, spec);
  std::vector<LayerScore> layers;
  layers.reserve(metrics.size());
  for (size_t l = 0; l < metrics.size(); ++l) {
    layers.push_back({static_cast<int64_t>(l), metrics[l], transitions[l]});
  }
  return layers;
}

}  // namespace

std::vector<std::optional<double>> TransitionScores(absl::Span<const LayerMetrics> metrics,
                                                    const PivotSpec& spec) {
  const size_t count = metrics.size();
  std::vector<double> negative_entropy(count);
  std::vector<double> sparsity(count);
  std::vector<double> variance(count);
  for (size_t l = 0; l < count; ++l) {
    negative_entropy[l] = -metrics[l].entropy;
    sparsity[l] = metrics[l].sparsity;
    variance[l] = metrics[l].variance;
  }
  std::vector<double> scores(count, 0.0);
  AddNormalisedGradient(negative_entropy, spec.entropy_weight, scores);
  AddNormalisedGradient(sparsity, spec.sparsity_weight, scores);
  AddNormalisedGradient(variance, spec.variance_weight, scores);

  std::vector<std::optional<double>> transitions(count);
  for (size_t l = 1; l < count; ++l) transitions[l] = scores[l];
  return transitions;
}

PivotRange PossiblePivots(int64_t layers, const PivotSpec& spec) {
  if (const auto given = spec.given_layer()) return {*given, *given};
  const SearchRange range = RangeFor(layers, spec);
  if (range.first > range.last) return {layers - 1, layers - 1};
  if (spec.mode == PivotMode::kExact) return {range.first + 1, range.last + 1};
  return {range.first + 1, std::min(range.last, DeadlineLayer(layers, range, spec)) + 1};
}

PivotRange PossibleCentralities(int64_t layers, const PivotSpec& spec) {
  const SearchRange range = RangeFor(layers, spec);
  const bool online = spec.mode != PivotMode::kExact && !spec.given_layer().has_value();
  if (!online || range.first > range.last) return PossiblePivots(layers, spec);
  const int64_t deadline = DeadlineLayer(layers, range, spec);
  return {std::min(range.first + std::min(spec.patience, layers), deadline), deadline};
}

std::optional<PivotDecision> DecideAfter(absl::Span<const LayerMetrics> seen, int64_t layers,
                                         const PivotSpec& spec) {
  const auto at = static_cast<int64_t>(seen.size()) - 1;
  if (const auto given = spec.given_layer()) {
    if (at < *given) return std::nullopt;
    PivotDecision decision = DecideFixed(seen, spec);
    if (*given + 1 < layers) decision.skeleton_from_layer = *given + 1;
    return decision;
  }
  if (spec.mode != PivotMode::kExact) return DecideOnline(seen, layers, spec);
  if (at < layers - 1) return std::nullopt;
  return DecideExact(seen, spec);
}

PivotDecision DecideExact(absl::Span<const LayerMetrics> metrics, const PivotSpec& spec) {
  const auto layers = static_cast<int64_t>(metrics.size());
  PivotDecision decision;
  decision.mode = PivotMode::kExact;
  decision.layers = Scored(metrics, spec);
  decision.decided_at_layer = layers - 1;
  decision.pivot_layer = layers - 1;
  const SearchRange range = RangeFor(layers, spec);
  if (range.first <= range.last) {
    decision.transition_layer = BestLayer(decision.layers, range);
    decision.pivot_layer = *decision.transition_layer + 1;
  }
  decision.centrality_layer = decision.pivot_layer;
  return decision;
}

PivotDecision DecideFixed(absl::Span<const LayerMetrics> metrics, const PivotSpec& spec) {
  PivotDecision decision;
  decision.mode = spec.mode;
  decision.pivot_layer = spec.given_layer().value_or(0);
  decision.decided_at_layer = decision.centrality_layer = decision.pivot_layer;
  if (spec.mode == PivotMode::kProfiled) decision.profiled_prompts = spec.profiled_prompts;
  decision.layers = Scored(metrics, spec);
  return decision;
}

std::optional<PivotDecision> DecideOnline(absl::Span<const LayerMetrics> seen, int64_t layers,
                                          const PivotSpec& spec) {
  const auto at = static_cast<int64_t>(seen.size()) - 1;
  const SearchRange range = RangeFor(layers, spec);
  const bool search = range.first <= range.last;
  if (at < (search ? range.first : layers - 1)) return std::nullopt;
  PivotDecision decision;
  decision.mode = PivotMode::kOnline;
  decision.decided_at_layer = decision.centrality_layer = at;
  decision.layers = Scored(seen, spec);
  decision.pivot_layer = layers - 1;
  if (search) {
    const int64_t best = BestLayer(decision.layers, range);
    // A small rise beside what the first layers did is no transition; where nothing rises at all
    // there is none to confirm.
    const double score = *decision.layers[best].transition;
    const double highest = spec.entropy_weight + spec.sparsity_weight + spec.variance_weight;
    const bool high = score > 0 && score >= spec.confirm_score * highest - kSlack;
    const bool confirmed = high && at - best >= spec.patience;
    if (!confirmed && at < DeadlineLayer(layers, range, spec)) return std::nullopt;
    decision.transition_layer = best;
    decision.pivot_layer = best + 1;
  }
  const int64_t from = std::max(at, decision.pivot_layer) + 1;
  if (from < layers) decision.skeleton_from_layer = from;
  return decision;
}

}  // namespace structkv::method
