// What a compression gives back.
#pragma once

#include <cstdint>
#include <optional>
#include <variant>
#include <vector>

#include "absl/types/span.h"
#include "structkv/bytes.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::client {

// One layer's answer.
struct LayerResult {
  uint32_t layer = 0;
  // Tokens kept in each KV head; of a layer of skeleton rows at most the skeleton.
  uint32_t kept_tokens = 0;
  // Blocks of `keys` where they are paged: [block, kv_head, token, dim] or the layout of `Open`.
  uint32_t kept_blocks = 0;
  // Where the method has statistics.
  std::optional<v1::LayerMetrics> metrics;
  // [kept_tokens] or, selected per KV head, [kv_heads, kept_tokens]; int32, ascending in each row.
  Bytes positions;
  // [kv_heads, kept_tokens, dim] or the layout of `Open`, of its dtype; empty for a plan. Values
  // that are a part of the keys (ModelGeometry.values_in_keys) are empty too.
  Bytes keys;
  Bytes values;
  // [1] or [kv_heads] float32 by `Open.kv_scales`, as they were sent; empty for a plan.
  Bytes key_scales;
  Bytes value_scales;
  // [N] or [kv_heads, N] float32, on request; of a layer of skeleton rows the skeleton's tokens in
  // place of N.
  Bytes saliency;

  absl::Span<const int32_t> position_values() const { return positions.as<int32_t>(); }
};

// Rows of a layer that the server asks for (`Open.pull`).
struct RowPull {
  uint32_t layer = 0;
  // Rows of each KV head.
  uint32_t kept_tokens = 0;
  // Whether rows of keys are asked for beside those of values.
  bool keys = false;
  // [kept_tokens] or, selected per KV head, [kv_heads, kept_tokens]; int32, ascending in each row:
  // tokens of the prompt.
  Bytes positions;

  absl::Span<const int32_t> position_values() const { return positions.as<int32_t>(); }
};

// The pivot layer and the skeleton.
struct PivotResult {
  uint32_t pivot_layer = 0;
  std::optional<uint32_t> transition_layer;
  // What really answered.
  v1::PivotMode mode = v1::PIVOT_MODE_UNSPECIFIED;
  // The layer whose statistics made the decision.
  uint32_t decided_at_layer = 0;
  // The first layer that may be sent as skeleton rows.
  std::optional<uint32_t> skeleton_from_layer;
  // Prompts behind the profile, where PROFILED answered.
  uint32_t profiled_prompts = 0;
  // Metrics and scores of every layer that the decision saw, in layer order.
  std::vector<v1::LayerMetrics> layers;
  // Ascending.
  std::vector<int32_t> skeleton;
  // [N], on request.
  std::vector<float> centrality;
};

// One step of a session. The summary comes last, after it was checked against what was sent and
// received.
using Event = std::variant<LayerResult, PivotResult, v1::Summary>;

// A whole compressed prompt.
struct Compressed {
  v1::Opened opened;
  std::vector<LayerResult> layers;  // in layer order
  std::optional<PivotResult> pivot;
  v1::Summary summary;
};

}  // namespace structkv::client
