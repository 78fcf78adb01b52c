// How many tokens are kept (docs/method.md, section 4). Counts follow from the spec and the
// prompt's length alone, so they are known before any data arrive.
#pragma once

#include <cstdint>

#include "service/method/method_spec.h"

namespace structkv::method {

// ceil(ratio * tokens - 1e-9): 0.1 of 1,000 is 100, whatever the rounding of 0.1. ratio in [0, 1].
int64_t ShareOfTokens(double ratio, int64_t tokens);

// Rows of the observation window: min(w, tokens); 0 for methods without statistics.
int64_t WindowRows(const MethodSpec& spec, int64_t tokens);

// Tokens kept under `budget` beside a window of `window_rows`, 1 .. tokens. tokens >= 1.
int64_t BudgetTokens(const Budget& budget, int64_t window_rows, int64_t tokens);

// Tokens that the layers keep in every KV head, 1 .. tokens; their mean where the layers' budgets
// differ. tokens >= 1.
int64_t KeptTokens(const MethodSpec& spec, int64_t tokens);

// Tokens that layer `layer` of `layers` keeps in every KV head, 1 .. tokens; 0 in the layers that
// GemFilter does not look at.
int64_t KeptTokens(const MethodSpec& spec, int64_t tokens, int64_t layer, int64_t layers);

// The largest of the layers' counts.
int64_t LargestKeptTokens(const MethodSpec& spec, int64_t tokens, int64_t layers);

// H2O: of `kept` tokens, how many are the latest ones: floor(recent_share * kept).
int64_t RecentTokens(const MethodSpec& spec, int64_t kept);

// Tokens in the skeleton, 1 .. tokens; 0 where the method has none.
int64_t SkeletonTokens(const MethodSpec& spec, int64_t tokens);

}  // namespace structkv::method
