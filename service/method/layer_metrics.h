// The three metrics of a layer's saliency distribution (docs/method.md, section 3).
#pragma once

#include <cstdint>

#include "kernels/backend.h"

namespace structkv::method {

struct LayerMetrics {
  double entropy = 0;   // -sum p ln p, nats
  double sparsity = 0;  // mass of the ceil(f N) largest p, [0, 1]
  double variance = 0;  // N sum p^2 - 1
};

// `sums.total` must be above 0; tokens >= 1.
LayerMetrics MetricsFromSums(const SaliencySums& sums, int64_t tokens);

}  // namespace structkv::method
