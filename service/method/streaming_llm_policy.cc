#include <algorithm>
#include <numeric>

#include "service/method/budget.h"
#include "service/method/policies.h"

namespace structkv::method {
namespace {

// The first tokens and the most recent ones (arXiv 2309.17453).
class StreamingLlmPolicy final : public SelectionPolicy {
 public:
  explicit StreamingLlmPolicy(const MethodSpec& spec) : spec_(spec) {}

  PolicyInput input() const override { return PolicyInput::kNothing; }

  int64_t ScratchFloats(int64_t /*tokens*/, int64_t /*heads*/) const override { return 0; }

  void Select(const SelectionInput& input, const Backend& /*backend*/, ParallelFor /*parallel*/,
              absl::Span<float> /*scratch*/, absl::Span<int32_t> positions) const override {
    const int64_t keep = KeptTokens(spec_, input.tokens);
    const int64_t sinks = std::min(spec_.sink_tokens, input.tokens);
    const auto recent = positions.begin() + sinks;
    std::iota(positions.begin(), recent, 0);
    std::iota(recent, positions.begin() + keep,
              static_cast<int32_t>(input.tokens - (keep - sinks)));
  }

 private:
  MethodSpec spec_;
};

}  // namespace

std::unique_ptr<SelectionPolicy> MakeStreamingLlmPolicy(const MethodSpec& spec) {
  return std::make_unique<StreamingLlmPolicy>(spec);
}

}  // namespace structkv::method
