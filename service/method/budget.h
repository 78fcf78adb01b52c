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

// Tokens that each layer keeps in every KV head, 1 .. tokens. tokens >= 1.
int64_t KeptTokens(const MethodSpec& spec, int64_t tokens);

// Tokens in the skeleton, 1 .. tokens; 0 where the method has none.
int64_t SkeletonTokens(const MethodSpec& spec, int64_t tokens);

}  // namespace structkv::method
