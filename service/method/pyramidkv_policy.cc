#include "service/method/budget.h"
#include "service/method/policies.h"
#include "service/method/top_scores.h"

namespace structkv::method {
namespace {

// SnapKV's selection with a budget that falls from layer to layer (arXiv 2406.02069).
class PyramidKvPolicy final : public SelectionPolicy {
 public:
  explicit PyramidKvPolicy(const MethodSpec& spec) : spec_(spec) {}

  PolicyInput input() const override {
    return spec_.granularity == Granularity::kPerKvHead ? PolicyInput::kPerKvHead
                                                        : PolicyInput::kSaliency;
  }

  int64_t ScratchFloats(int64_t tokens, int64_t heads) const override {
    return TopScoresScratch(spec_.pooling, tokens, heads);
  }

  void Select(const SelectionInput& input, const Backend& backend, ParallelFor parallel,
              absl::Span<float> scratch, absl::Span<int32_t> positions) const override {
    SelectTopScores({.window = WindowRows(spec_, input.tokens),
                     .keep = KeptTokens(spec_, input.tokens, input.layer, input.layers),
                     .pooling = spec_.pooling,
                     .pooling_kernel = spec_.pooling_kernel},
                    input, backend, parallel, scratch, positions);
  }

 private:
  MethodSpec spec_;
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakePyramidKvPolicy(const MethodSpec& spec) {
  return std::make_unique<PyramidKvPolicy>(spec);
}

}  // namespace structkv::method
