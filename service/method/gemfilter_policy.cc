#include "service/method/budget.h"
#include "service/method/policies.h"
#include "service/method/top_scores.h"

namespace structkv::method {
namespace {

// The filter layer's tokens of highest smoothed saliency of the last query, over all heads (arXiv
// 2409.17422). Other layers keep nothing: the worker prefills again with these tokens.
class GemFilterPolicy final : public TopScoresPolicy {
 public:
  using TopScoresPolicy::TopScoresPolicy;

  PolicyInput input() const override { return PolicyInput::kSaliency; }

  std::optional<TopScoresParams> TopScores(const SelectionInput& input) const override {
    if (input.layer != spec().filter_layer) return std::nullopt;
    return Keep(input, KeptTokens(spec(), input.tokens));
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeGemFilterPolicy(const MethodSpec& spec) {
  return std::make_unique<GemFilterPolicy>(spec);
}

}  // namespace structkv::method
