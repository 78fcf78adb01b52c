// Finds the pivot layer from the metrics of all layers (docs/method.md, section 3).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "service/method/layer_metrics.h"
#include "service/method/method_spec.h"

namespace structkv::method {

// A layer as the decision saw it.
struct LayerScore {
  int64_t layer = 0;
  LayerMetrics metrics;
  std::optional<double> transition;  // T(l); layer 0 has none
};

struct PivotDecision {
  PivotMode mode = PivotMode::kExact;
  int64_t pivot_layer = 0;  // L*
  std::optional<int64_t>
      transition_layer;  // argmax T; none for kFixed, or where there was nothing to search
  std::vector<LayerScore> layers;  // every layer seen, ascending
};

// T(l) for l = 1 .. metrics.size() - 1, normalised over the layers given. Element 0 is nullopt.
std::vector<std::optional<double>> TransitionScores(absl::Span<const LayerMetrics> metrics,
                                                    const PivotSpec& spec);

// The layers that can become the pivot, first <= last, known before any data arrive.
struct PivotRange {
  int64_t first = 0;
  int64_t last = 0;
};
PivotRange PossiblePivots(int64_t layers, const PivotSpec& spec);

// EXACT: `metrics` holds all layers. The search range is cut at L - 2, so that the pivot is a
// layer; where it is empty (L < 3, or shares that span no layer) the pivot is the last layer:
// nothing is cut. Ties go to the lowest layer.
PivotDecision DecideExact(absl::Span<const LayerMetrics> metrics, const PivotSpec& spec);

// FIXED: `metrics` holds layers 0 .. fixed_layer at least; all given are reported.
PivotDecision DecideFixed(absl::Span<const LayerMetrics> metrics, const PivotSpec& spec);

}  // namespace structkv::method
