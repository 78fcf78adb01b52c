// The seam between methods: which tokens of a layer stay.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "service/method/method_spec.h"

namespace structkv::method {

// What a policy looks at.
enum class PolicyInput : uint8_t {
  kNothing,    // positions follow from the prompt's length
  kSaliency,   // one score per token, summed over the KV heads
  kPerKvHead,  // one score per token and KV head
};

// A layer as a policy sees it.
struct SelectionInput {
  int64_t tokens = 0;
  // Tokens of the prompt that the budget is a share of, >= tokens: a layer of skeleton rows has
  // fewer of its own. 0: `tokens`.
  int64_t budget_tokens = 0;
  // Score vectors: 1, or the KV heads for kPerKvHead.
  int64_t heads = 1;
  // [heads, tokens], finite and not negative; may be null for kNothing.
  const float* scores = nullptr;
  // Which layer it is, for methods whose layers differ: 0 .. layers - 1.
  int64_t layer = 0;
  int64_t layers = 1;
};

// A selection by scores alone: the window, and the best of the smoothed scores of the tokens before
// it.
struct TopScoresParams {
  int64_t window = 0;  // rows of the window, <= tokens
  int64_t keep = 0;    // window <= keep <= tokens
  Pooling pooling = Pooling::kNone;
  int64_t pooling_kernel = 1;
};

// One per method. Immutable and thread-safe.
class SelectionPolicy {
 public:
  virtual ~SelectionPolicy() = default;

  virtual PolicyInput input() const = 0;

  // What Select is, where it is that; of `input` the scores are not looked at.
  virtual std::optional<TopScoresParams> TopScores(const SelectionInput& /*input*/) const {
    return std::nullopt;
  }

  // Scratch that Select needs, in floats.
  virtual int64_t ScratchFloats(int64_t tokens, int64_t heads) const = 0;

  // Writes the kept positions of each score vector, [heads, min(kept, tokens)], with the layer's
  // KeptTokens of `budget_tokens`, ascending in each row; counts are exact. Ties go to the lower
  // position. `scratch` has ScratchFloats elements.
  virtual void Select(const SelectionInput& input, const Backend& backend, ParallelFor parallel,
                      absl::Span<float> scratch, absl::Span<int32_t> positions) const = 0;
};

// The policy of `spec.method`. `spec` was validated.
std::unique_ptr<SelectionPolicy> MakeSelectionPolicy(const MethodSpec& spec);

}  // namespace structkv::method
