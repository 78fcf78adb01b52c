#include <numeric>

#include "service/method/policies.h"

namespace structkv::method {
namespace {

// Everything stays; what other methods are compared with.
class FullPolicy final : public SelectionPolicy {
 public:
  PolicyInput input() const override { return PolicyInput::kNothing; }

  int64_t ScratchFloats(int64_t /*tokens*/, int64_t /*heads*/) const override { return 0; }

  void Select(const SelectionInput& input, const Backend& /*backend*/, ParallelFor /*parallel*/,
              absl::Span<float> /*scratch*/, absl::Span<int32_t> positions) const override {
    std::iota(positions.begin(), positions.begin() + input.tokens, 0);
  }
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeFullPolicy() { return std::make_unique<FullPolicy>(); }

}  // namespace structkv::method
