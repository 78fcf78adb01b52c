// The step that methods with an observation window share: smooth, then keep the window and the best
// of the tokens before it.
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "service/method/selection_policy.h"

namespace structkv::method {

// Floats of scratch that SelectTopScores needs.
int64_t TopScoresScratch(Pooling pooling, int64_t tokens, int64_t heads);

// Writes [heads, keep] positions. Smoothing sees the tokens before the window alone: the window's
// own scores, which are large and kept anyway, must not lift their neighbours.
void SelectTopScores(const TopScoresParams& params, const SelectionInput& input,
                     const Backend& backend, ParallelFor parallel, absl::Span<float> scratch,
                     absl::Span<int32_t> positions);

// What methods that select so have in common.
class TopScoresPolicy : public SelectionPolicy {
 public:
  explicit TopScoresPolicy(const MethodSpec& spec) : spec_(spec) {}

  PolicyInput input() const override;
  int64_t ScratchFloats(int64_t tokens, int64_t heads) const override;
  // Where TopScores() has an answer; nothing is written elsewhere.
  void Select(const SelectionInput& input, const Backend& backend, ParallelFor parallel,
              absl::Span<float> scratch, absl::Span<int32_t> positions) const override;

 protected:
  // The spec's window and smoothing, with that many tokens kept.
  TopScoresParams Keep(const SelectionInput& input, int64_t keep) const;
  const MethodSpec& spec() const { return spec_; }

 private:
  const MethodSpec spec_;
};

}  // namespace structkv::method
