#include <algorithm>

#include "service/method/budget.h"
#include "service/method/policies.h"
#include "service/method/top_scores.h"

namespace structkv::method {
namespace {

// The window and the tokens of highest saliency, per layer unless asked otherwise (arXiv
// 2604.06746).
class StructKvPolicy final : public TopScoresPolicy {
 public:
  using TopScoresPolicy::TopScoresPolicy;

  std::optional<TopScoresParams> TopScores(const SelectionInput& input) const override {
    const int64_t budget = input.budget_tokens > 0 ? input.budget_tokens : input.tokens;
    return Keep(input, std::min(KeptTokens(spec(), budget), input.tokens));
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeStructKvPolicy(const MethodSpec& spec) {
  return std::make_unique<StructKvPolicy>(spec);
}

}  // namespace structkv::method
