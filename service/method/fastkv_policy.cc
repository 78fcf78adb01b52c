#include <algorithm>

#include "service/method/budget.h"
#include "service/method/policies.h"
#include "service/method/top_scores.h"

namespace structkv::method {
namespace {

// The window and the tokens of highest smoothed saliency, per KV head unless asked otherwise (arXiv
// 2502.01068). The skeleton is chosen apart, by the scores of one layer.
class FastKvPolicy final : public SelectionPolicy {
 public:
  explicit FastKvPolicy(const MethodSpec& spec) : spec_(spec) {}

  PolicyInput input() const override {
    return spec_.granularity == Granularity::kPerKvHead ? PolicyInput::kPerKvHead
                                                        : PolicyInput::kSaliency;
  }

  int64_t ScratchFloats(int64_t tokens, int64_t heads) const override {
    return TopScoresScratch(spec_.pooling, tokens, heads);
  }

  void Select(const SelectionInput& input, const Backend& backend, ParallelFor parallel,
              absl::Span<float> scratch, absl::Span<int32_t> positions) const override {
    const int64_t budget = input.budget_tokens > 0 ? input.budget_tokens : input.tokens;
    SelectTopScores({.window = WindowRows(spec_, input.tokens),
                     .keep = std::min(KeptTokens(spec_, budget), input.tokens),
                     .pooling = spec_.pooling,
                     .pooling_kernel = spec_.pooling_kernel},
                    input, backend, parallel, scratch, positions);
  }

 private:
  MethodSpec spec_;
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeFastKvPolicy(const MethodSpec& spec) {
  return std::make_unique<FastKvPolicy>(spec);
}

}  // namespace structkv::method
