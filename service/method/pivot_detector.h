// Finds the pivot layer from the metrics of the layers (docs/method.md, section 3).
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
  // What really answered: kProfiled only where the profile gave the layer, kOnline in its place.
  PivotMode mode = PivotMode::kExact;
  int64_t pivot_layer = 0;  // L*
  // argmax T; none where the layer was given, or where there was nothing to search
  std::optional<int64_t> transition_layer;
  int64_t decided_at_layer = 0;  // the layer whose statistics made the decision
  int64_t centrality_layer = 0;  // the skeleton ranks the tokens by C of this layer
  // The first layer that needs the skeleton alone, max(L*, decided_at_layer) + 1; none past the
  // end.
  std::optional<int64_t> skeleton_from_layer;
  int64_t profiled_prompts = 0;    // prompts behind the profile; kProfiled
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

// The layers whose centrality can be the skeleton's, first <= last, known before any data arrive.
PivotRange PossibleCentralities(int64_t layers, const PivotSpec& spec);

// The decision, where it falls with the last of the layers `seen`, which are layers 0 ..
// seen.size() - 1 of `layers`; nullopt while it stays open. A function of these layers alone, so
// that the order in which layers arrive leaves no trace. Not to be asked past a decision.
std::optional<PivotDecision> DecideAfter(absl::Span<const LayerMetrics> seen, int64_t layers,
                                         const PivotSpec& spec);

// EXACT: `metrics` holds all layers. The search range is cut at L - 2, so that the pivot is a
// layer; where it is empty (L < 3, or shares that span no layer) the pivot is the last layer:
// nothing is cut. Ties go to the lowest layer.
PivotDecision DecideExact(absl::Span<const LayerMetrics> metrics, const PivotSpec& spec);

// The layer is given, by FIXED or by a profile: `metrics` holds layers 0 .. that layer at least;
// all are reported.
PivotDecision DecideFixed(absl::Span<const LayerMetrics> metrics, const PivotSpec& spec);

// ONLINE, with the layers seen so far: T is normalised over these layers alone. The best layer of
// the search range (the lowest at a tie) is confirmed once its T is above 0 and at least
// `confirm_score` of the weights' sum, and `patience` further layers were seen, none of which beats
// it; at the deadline the best so far is the answer, whatever its T. Where the search range is
// empty the answer is the last layer, after it.
std::optional<PivotDecision> DecideOnline(absl::Span<const LayerMetrics> seen, int64_t layers,
                                          const PivotSpec& spec);

}  // namespace structkv::method
