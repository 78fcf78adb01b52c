// What a picture of a compacted cache shows.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cli/safetensors.h"

namespace structkv::cli {

struct PlotData {
  // One value a layer; empty where the method has none. Layer 0 of `transition` is NaN.
  std::vector<float> entropy, sparsity, variance, transition;
  // Each layer's kept positions; of all KV heads one after the other where they differ.
  std::vector<std::vector<int32_t>> positions;
  // KV heads in each layer's positions: 1 where all keep the same.
  uint32_t heads = 1;
  std::vector<int32_t> skeleton;
  uint32_t prompt_tokens = 0;
  // In each KV head of a layer: the most and the least of the layers that keep any.
  uint32_t kept_tokens = 0;
  uint32_t least_kept_tokens = 0;
  std::optional<uint32_t> pivot_layer;
  std::optional<uint32_t> transition_layer;
  std::string pivot_mode;  // "exact", "online" and so on; empty in older files
  std::optional<uint32_t> decided_at_layer;
  // Layers in which the transition was searched, first and last.
  std::optional<std::pair<uint32_t, uint32_t>> search;
  std::string method;
  std::string model;
};

// Reads a compacted cache or plan. INVALID_ARGUMENT, with the file named, where it is neither.
absl::StatusOr<PlotData> ReadPlotData(const SafetensorsFile& file);

}  // namespace structkv::cli
