// What a prompt's answer must be, computed from its tensors in double precision, straight from the
// formulas and with none of the project's code.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "structkv/v1/compression.pb.h"
#include "tests/testing/prompt_data.h"

namespace structkv::testkit {

struct OracleLayer {
  // [kv_heads][N], local saliency per KV head; one row where the worker gave one.
  std::vector<std::vector<double>> per_head;
  std::vector<double> saliency;  // [N], summed
  // What the selection ranks: [1 or kv_heads][N - window], smoothed.
  std::vector<std::vector<double>> ranked;
  double entropy = 0;
  double sparsity = 0;
  double variance = 0;
};

struct OraclePivot {
  uint32_t pivot_layer = 0;
  std::optional<uint32_t> transition_layer;
  v1::PivotMode mode = v1::PIVOT_MODE_UNSPECIFIED;  // what really answers
  uint32_t decided_at = 0;
  std::optional<uint32_t> skeleton_from;
  std::vector<double> transition;  // by layer, of those that the decision saw; layer 0: 0
  std::vector<double> centrality;  // [N]
};

struct Oracle {
  explicit Oracle(const PromptData& data);
  std::vector<OracleLayer> layers;  // empty for methods without statistics
  std::optional<OraclePivot> pivot;
};

// Natural log-sum-exp of each window row's scaled scores, [query_heads, window].
std::vector<float> WindowLse(const PromptData& data, uint32_t layer);

}  // namespace structkv::testkit
