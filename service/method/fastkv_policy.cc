#include <algorithm>

#include "service/method/budget.h"
#include "service/method/policies.h"
#include "service/method/top_scores.h"

namespace structkv::method {
namespace {

// The window and the tokens of highest smoothed saliency, per KV head unless asked otherwise (arXiv
// 2502.01068). The skeleton is chosen apart, by the scores of one layer.
class FastKvPolicy final : public TopScoresPolicy {
 public:
  using TopScoresPolicy::TopScoresPolicy;

  std::optional<TopScoresParams> TopScores(const SelectionInput& input) const override {
    const int64_t budget = input.budget_tokens > 0 ? input.budget_tokens : input.tokens;
    return Keep(input, std::min(KeptTokens(spec(), budget), input.tokens));
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeFastKvPolicy(const MethodSpec& spec) {
  return std::make_unique<FastKvPolicy>(spec);
}

}  // namespace structkv::method
