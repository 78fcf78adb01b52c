// PyramidKV's budgets: many tokens in the first layers, few in the last (docs/method.md, section
// 4).
#pragma once

#include <cstdint>

#include "service/method/method_spec.h"

namespace structkv::method {

// Tokens that layer `layer` of `layers` keeps in every KV head, the window included: never more
// than the layer before, window rows .. tokens. Summed over the layers exactly layers times
// KeptTokens(spec, tokens), save for BudgetKind::kKvpress, which rounds each layer for itself.
// tokens >= 1, 0 <= layer < layers.
int64_t PyramidTokens(const MethodSpec& spec, int64_t tokens, int64_t layer, int64_t layers);

}  // namespace structkv::method
