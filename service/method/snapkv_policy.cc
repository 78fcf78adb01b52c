#include "service/method/budget.h"
#include "service/method/policies.h"
#include "service/method/top_scores.h"

namespace structkv::method {
namespace {

// The window and the tokens of highest smoothed saliency, per KV head unless asked otherwise
// (arXiv 2404.14469). The paper sums over the window where we take the mean: the order is the same.
class SnapKvPolicy final : public TopScoresPolicy {
 public:
  using TopScoresPolicy::TopScoresPolicy;

  std::optional<TopScoresParams> TopScores(const SelectionInput& input) const override {
    return Keep(input, KeptTokens(spec(), input.tokens));
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeSnapKvPolicy(const MethodSpec& spec) {
  return std::make_unique<SnapKvPolicy>(spec);
}

}  // namespace structkv::method
