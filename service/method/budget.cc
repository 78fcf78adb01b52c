#include "service/method/budget.h"

#include <algorithm>
#include <cmath>

#include "service/method/pyramid_budget.h"

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
    case BudgetKind::kKvpress:
      return std::clamp(
          static_cast<int64_t>(std::floor(budget.ratio * static_cast<double>(tokens))), at_least,
          tokens);
  }
  return tokens;
}

int64_t KeptTokens(const MethodSpec& spec, int64_t tokens) {
  switch (spec.method) {
    case Method::kStructKv:
    case Method::kSnapKv:
    case Method::kPyramidKv:
    case Method::kFastKv:
    case Method::kGemFilter:
    case Method::kH2o:
      return BudgetTokens(spec.kv_budget, WindowRows(spec, tokens), tokens);
    case Method::kStreamingLlm: {
      const int64_t sinks = std::min(spec.sink_tokens, tokens);
      return std::max(BudgetTokens(spec.kv_budget, 0, tokens), sinks);
    }
    case Method::kFull:
      return tokens;
  }
  return tokens;
}

int64_t KeptTokens(const MethodSpec& spec, int64_t tokens, int64_t layer, int64_t layers) {
  if (spec.method == Method::kPyramidKv) return PyramidTokens(spec, tokens, layer, layers);
  if (spec.method == Method::kGemFilter && layer != spec.filter_layer) return 0;
  return KeptTokens(spec, tokens);
}

int64_t LargestKeptTokens(const MethodSpec& spec, int64_t tokens, int64_t layers) {
  // A pyramid is widest at its first layer.
  if (spec.method == Method::kPyramidKv) return PyramidTokens(spec, tokens, 0, layers);
  return KeptTokens(spec, tokens);
}

int64_t RecentTokens(const MethodSpec& spec, int64_t kept) {
  constexpr double kSlack = 1e-9;
  const double recent = std::floor(spec.recent_share * static_cast<double>(kept) + kSlack);
  return std::clamp<int64_t>(static_cast<int64_t>(recent), 0, kept);
}

int64_t SkeletonTokens(const MethodSpec& spec, int64_t tokens) {
  if (!spec.has_skeleton()) return 0;
  if (spec.method == Method::kGemFilter) return KeptTokens(spec, tokens);
  return BudgetTokens(spec.skeleton_budget, WindowRows(spec, tokens), tokens);
}

}  // namespace structkv::method
