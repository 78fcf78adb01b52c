// The step that methods with an observation window share: smooth, then keep the window and the best
// of the tokens before it.
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "service/method/selection_policy.h"

namespace structkv::method {

struct TopScoresParams {
  int64_t window = 0;  // rows of the window, <= tokens
  int64_t keep = 0;    // window <= keep <= tokens
  Pooling pooling = Pooling::kNone;
  int64_t pooling_kernel = 1;
};

// Floats of scratch that SelectTopScores needs.
int64_t TopScoresScratch(Pooling pooling, int64_t tokens, int64_t heads);

// Writes [heads, keep] positions. Smoothing sees the tokens before the window alone: the window's
// own scores, which are large and kept anyway, must not lift their neighbours.
void SelectTopScores(const TopScoresParams& params, const SelectionInput& input,
                     const Backend& backend, ParallelFor parallel, absl::Span<float> scratch,
                     absl::Span<int32_t> positions);

}  // namespace structkv::method
