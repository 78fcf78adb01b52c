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

SearchRange RangeFor(int64_t layers, const PivotSpec& spec) {
  // Shares such as 0.3 of 10 must not lose a layer to the rounding of their product.
  constexpr double kSlack = 1e-9;
  const double depth = static_cast<double>(layers);
  SearchRange range;
  range.first =
      std::max<int64_t>(1, static_cast<int64_t>(std::ceil(spec.search_begin * depth - kSlack)));
  range.last = std::min<int64_t>(
      layers - 2, static_cast<int64_t>(std::floor(spec.search_end * depth + kSlack)));
  return range;
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
  if (spec.mode == PivotMode::kFixed) return {spec.fixed_layer, spec.fixed_layer};
  const SearchRange range = RangeFor(layers, spec);
  if (range.first > range.last) return {layers - 1, layers - 1};
  return {range.first + 1, range.last + 1};
}

PivotDecision DecideExact(absl::Span<const LayerMetrics> metrics, const PivotSpec& spec) {
  const auto layers = static_cast<int64_t>(metrics.size());
  PivotDecision decision;
  decision.mode = PivotMode::kExact;
  decision.layers = Scored(metrics, spec);

  const SearchRange range = RangeFor(layers, spec);
  if (range.first > range.last) {
    decision.pivot_layer = layers - 1;
    return decision;
  }
  int64_t best = range.first;
  for (int64_t l = range.first + 1; l <= range.last; ++l) {
    if (*decision.layers[l].transition > *decision.layers[best].transition) best = l;
  }
  decision.transition_layer = best;
  decision.pivot_layer = best + 1;
  return decision;
}

PivotDecision DecideFixed(absl::Span<const LayerMetrics> metrics, const PivotSpec& spec) {
  PivotDecision decision;
  decision.mode = PivotMode::kFixed;
  decision.pivot_layer = spec.fixed_layer;
  decision.layers = Scored(metrics, spec);
  return decision;
}

}  // namespace structkv::method
