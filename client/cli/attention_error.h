// How much attention changes when a compacted cache takes the place of the full one.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "client/cli/capture.h"
#include "structkv/result.h"

namespace structkv::cli {

// Outputs of the future queries' attention over the full prompt and the future tokens up to each
// query's own: [query_heads, future_tokens, value_dim] per layer.
using AttentionOutputs = std::vector<std::vector<float>>;

// FAILED_PRECONDITION where the capture has no future tokens.
absl::StatusOr<AttentionOutputs> FullAttention(const Capture& capture);

// The same over a compacted cache (not a plan) in place of the prompt.
absl::StatusOr<AttentionOutputs> CompactedAttention(const Capture& capture,
                                                    const client::Compressed& compressed);

struct AttentionError {
  // Relative L2 error of each layer's outputs, over heads and queries: |compacted - full| / |full|.
  std::vector<double> layers;
  double mean = 0;
  double worst = 0;
  size_t worst_layer = 0;
};
AttentionError CompareAttention(const AttentionOutputs& full, const AttentionOutputs& compacted);

}  // namespace structkv::cli
