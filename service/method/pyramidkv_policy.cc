#include "service/method/budget.h"
#include "service/method/policies.h"
#include "service/method/top_scores.h"

namespace structkv::method {
namespace {

// SnapKV's selection with a budget that falls from layer to layer (arXiv 2406.02069).
class PyramidKvPolicy final : public TopScoresPolicy {
 public:
  using TopScoresPolicy::TopScoresPolicy;

  std::optional<TopScoresParams> TopScores(const SelectionInput& input) const override {
    return Keep(input, KeptTokens(spec(), input.tokens, input.layer, input.layers));
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakePyramidKvPolicy(const MethodSpec& spec) {
  return std::make_unique<PyramidKvPolicy>(spec);
}

}  // namespace structkv::method
