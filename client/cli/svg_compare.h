// The picture of a comparison.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "client/cli/overlap.h"

namespace structkv::cli {

struct ComparedMethod {
  std::string name;
  uint64_t bytes = 0;  // of the compacted cache
  // Relative error of attention outputs: the mean over layers, and the worst layer's. None where
  // there is no compacted cache.
  std::optional<double> error;
  std::optional<double> worst_error;
  KeptSets sets;
  std::optional<uint32_t> pivot_layer;
};

struct ComparisonPicture {
  std::string model;  // may be empty
  uint32_t prompt_tokens = 0;
  uint32_t future_tokens = 0;  // whose attention the errors are of
  double kv_budget = 0;        // share
  uint64_t full_bytes = 0;     // of the prompt's cache
  std::vector<ComparedMethod> methods;
};

// A self-contained SVG document: for each method the bytes that it keeps, its error, how much of it
// each other method keeps, and the tokens that its layers keep. Readable on light and on dark
// ground.
std::string RenderComparison(const ComparisonPicture& picture);

}  // namespace structkv::cli
