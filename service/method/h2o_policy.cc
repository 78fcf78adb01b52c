#include "service/method/budget.h"
#include "service/method/policies.h"
#include "service/method/top_scores.h"

namespace structkv::method {
namespace {

// The latest tokens and the heavy hitters: those of the others that drew the most attention of all
// queries (arXiv 2306.14048).
class H2oPolicy final : public SelectionPolicy {
 public:
  explicit H2oPolicy(const MethodSpec& spec) : spec_(spec) {}

  PolicyInput input() const override {
    return spec_.granularity == Granularity::kPerKvHead ? PolicyInput::kPerKvHead
                                                        : PolicyInput::kSaliency;
  }

  int64_t ScratchFloats(int64_t /*tokens*/, int64_t /*heads*/) const override { return 0; }

  void Select(const SelectionInput& input, const Backend& backend, ParallelFor parallel,
              absl::Span<float> scratch, absl::Span<int32_t> positions) const override {
    const int64_t keep = KeptTokens(spec_, input.tokens);
    SelectTopScores({.window = RecentTokens(spec_, keep), .keep = keep}, input, backend, parallel,
                    scratch, positions);
  }

 private:
  MethodSpec spec_;
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeH2oPolicy(const MethodSpec& spec) {
  return std::make_unique<H2oPolicy>(spec);
}

}  // namespace structkv::method
