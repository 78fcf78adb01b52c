#include "service/method/budget.h"
#include "service/method/policies.h"
#include "service/method/top_scores.h"

namespace structkv::method {
namespace {

// The filter layer's tokens of highest smoothed saliency of the last query, over all heads (arXiv
// 2409.17422). Other layers keep nothing: the worker prefills again with these tokens.
class GemFilterPolicy final : public SelectionPolicy {
 public:
  explicit GemFilterPolicy(const MethodSpec& spec) : spec_(spec) {}

  PolicyInput input() const override { return PolicyInput::kSaliency; }

  int64_t ScratchFloats(int64_t tokens, int64_t heads) const override {
    return TopScoresScratch(spec_.pooling, tokens, heads);
  }

  void Select(const SelectionInput& input, const Backend& backend, ParallelFor parallel,
              absl::Span<float> scratch, absl::Span<int32_t> positions) const override {
    if (input.layer != spec_.filter_layer) return;
    SelectTopScores({.window = WindowRows(spec_, input.tokens),
                     .keep = KeptTokens(spec_, input.tokens),
                     .pooling = spec_.pooling,
                     .pooling_kernel = spec_.pooling_kernel},
                    input, backend, parallel, scratch, positions);
  }

 private:
  MethodSpec spec_;
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeGemFilterPolicy(const MethodSpec& spec) {
  return std::make_unique<GemFilterPolicy>(spec);
}

}  // namespace structkv::method
