// Whether layers that come from the host take a GPU the longer of their copies and their
// computation, or the sum of both.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace structkv::gpu {

// Layers of Llama-3.1-8B's geometry in bf16, log-sum-exp given, at 10 %.
struct OverlapOptions {
  std::vector<int64_t> tokens = {8192, 32768, 131072};
  std::vector<int> prompts = {1, 4};  // at once; as many as a GPU computes for
  int64_t query_heads = 32;
  int64_t kv_heads = 8;
  int64_t dim = 128;
  int64_t window = 8;
  int layers = 16;  // that follow one another in a round, in two sets of buffers
  int rounds = 5;   // of which the median counts, after one more
};

// Wall time over layers of all prompts together.
struct OverlapRow {
  bool pinned = false;  // the host's memory; false: pageable, as where nothing can be pinned
  int64_t tokens = 0;
  int prompts = 0;
  double copies_micros = 0;       // a layer's keys to the device, as a call copies them
  double compute_micros = 0;      // the call with keys and values on the device: rows to the host
  double together_micros = 0;     // the call with keys and values in the host's memory
  int64_t positions_off_cpu = 0;  // of a layer, of those that stay: that the CPU does not keep

  double over_max() const;
  double over_sum() const;
};

// On the backend's only GPU, whose reserve has room for the keys and values of two layers and the
// keys of each prompt. INTERNAL where a layer's answer from the host's memory is not that from the
// device's, or its rows are not those at its positions.
absl::StatusOr<std::vector<OverlapRow>> MeasureOverlap(const Backend& backend,
                                                       const OverlapOptions& options);

std::string OverlapJson(const std::string& device, const std::vector<OverlapRow>& rows);
std::string OverlapTable(const std::vector<OverlapRow>& rows);

}  // namespace structkv::gpu
