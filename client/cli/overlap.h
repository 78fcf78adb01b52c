// How much two methods agree on what to keep.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "structkv/result.h"

namespace structkv::cli {

// The positions that each layer and KV head keeps: [layers][kv_heads], ascending.
using KeptSets = std::vector<std::vector<std::vector<int32_t>>>;

// Of a whole prompt. A set that holds for all heads is every head's; GemFilter's is every layer's.
KeptSets KeptSetsOf(const client::Compressed& compressed, uint32_t kv_heads);

// The share of `base`'s tokens that `other` keeps as well, over all layers and heads.
double Overlap(const KeptSets& base, const KeptSets& other);

}  // namespace structkv::cli
