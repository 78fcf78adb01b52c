#include "service/method/budget.h"

#include <algorithm>
#include <cmath>

namespace structkv::method {

int64_t ShareOfTokens(double ratio, int64_t tokens) {
  // The product of a decimal ratio may lie a rounding above the integer that was meant.
  constexpr double kSlack = 1e-9;
  const double share = std::ceil(ratio * static_cast<double>(tokens) - kSlack);
  return std::clamp<int64_t>(static_cast<int64_t>(share), 0, tokens);
}

int64_t WindowRows(const MethodSpec& spec, int64_t tokens) {
  return spec.needs_statistics() ? std::min(spec.window, tokens) : 0;
}

int64_t BudgetTokens(const Budget& budget, int64_t window_rows, int64_t tokens) {
  const int64_t share = ShareOfTokens(budget.ratio, tokens);
  const int64_t at_least = std::max<int64_t>(window_rows, 1);
  switch (budget.kind) {
    case BudgetKind::kIncludesWindow:
      return std::clamp(share, at_least, tokens);
    case BudgetKind::kWindowOnTop:
      return std::clamp(share + window_rows, at_least, tokens);
  }
  return tokens;
}

int64_t KeptTokens(const MethodSpec& spec, int64_t tokens) {
  switch (spec.method) {
    case Method::kStructKv:
    case Method::kSnapKv:
      return BudgetTokens(spec.kv_budget, WindowRows(spec, tokens), tokens);
    case Method::kStreamingLlm: {
      const int64_t sinks = std::min(spec.sink_tokens, tokens);
      return std::clamp(ShareOfTokens(spec.kv_budget.ratio, tokens), std::max<int64_t>(sinks, 1),
                        tokens);
    }
    case Method::kFull:
      return tokens;
  }
  return tokens;
}

int64_t SkeletonTokens(const MethodSpec& spec, int64_t tokens) {
  if (!spec.has_skeleton()) return 0;
  return BudgetTokens(spec.skeleton_budget, WindowRows(spec, tokens), tokens);
}

}  // namespace structkv::method
