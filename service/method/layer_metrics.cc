#include "service/method/layer_metrics.h"

#include <algorithm>
#include <cmath>

namespace structkv::method {

LayerMetrics MetricsFromSums(const SaliencySums& sums, int64_t tokens) {
  // With p = S / T: -sum p ln p = ln T - (sum S ln S) / T, and N sum p^2 - 1 = N (sum S^2) / T^2
  // - 1. Rounding may carry a value a hair past its bound, which no reader expects.
  const double n = static_cast<double>(tokens);
  const double total = sums.total;
  LayerMetrics metrics;
  metrics.entropy = std::clamp(std::log(total) - sums.sum_s_log_s / total, 0.0, std::log(n));
  metrics.sparsity = std::clamp(sums.top_mass / total, 0.0, 1.0);
  metrics.variance = std::max(0.0, n * (sums.sum_squares / total / total) - 1.0);
  return metrics;
}

}  // namespace structkv::method
