#include "service/method/top_scores.h"

#include <algorithm>

#include "service/method/budget.h"

namespace structkv::method {

int64_t TopScoresScratch(Pooling pooling, int64_t tokens, int64_t heads) {
  return pooling == Pooling::kNone ? 0 : tokens * heads;
}

void SelectTopScores(const TopScoresParams& params, const SelectionInput& input,
                     const Backend& backend, ParallelFor parallel, absl::Span<float> scratch,
                     absl::Span<int32_t> positions) {
  const int64_t tokens = input.tokens;
  const int64_t before_window = tokens - params.window;
  parallel(input.heads, [&](int64_t head) {
    const float* scores = input.scores + head * tokens;
    if (params.pooling != Pooling::kNone && before_window > 0) {
      float* smoothed = scratch.data() + head * tokens;
      backend.Pool(scores, before_window, params.pooling, params.pooling_kernel, smoothed);
      std::fill(smoothed + before_window, smoothed + tokens, 0.0F);
      scores = smoothed;
    }
    backend.Select(
        {.scores = scores, .tokens = tokens, .window = params.window, .keep = params.keep},
        positions.data() + head * params.keep);
  });
}

PolicyInput TopScoresPolicy::input() const {
  return spec_.granularity == Granularity::kPerKvHead ? PolicyInput::kPerKvHead
                                                      : PolicyInput::kSaliency;
}

int64_t TopScoresPolicy::ScratchFloats(int64_t tokens, int64_t heads) const {
  return TopScoresScratch(spec_.pooling, tokens, heads);
}

void TopScoresPolicy::Select(const SelectionInput& input, const Backend& backend,
                             ParallelFor parallel, absl::Span<float> scratch,
                             absl::Span<int32_t> positions) const {
  const std::optional<TopScoresParams> params = TopScores(input);
  if (params.has_value()) {
    SelectTopScores(*params, input, backend, parallel, scratch, positions);
  }
}

TopScoresParams TopScoresPolicy::Keep(const SelectionInput& input, int64_t keep) const {
  return {.window = WindowRows(spec_, input.tokens),
          .keep = keep,
          .pooling = spec_.pooling,
          .pooling_kernel = spec_.pooling_kernel};
}

}  // namespace structkv::method
