#include "tests/kernels/saliency_bound.h"

#include <algorithm>
#include <cmath>

#include "kernels/reference/element.h"
#include "kernels/saliency_checks.h"

namespace structkv::testing {
namespace {

constexpr double kUnit = 1.0 / (1 << 24);
constexpr double kHalfSmallest = 1.0 / (1 << 25);
const double kHalfRelative = std::expm1(2 * std::ldexp(1.0, -11) + 17 * kHalfSmallest);

// At least the sum of |q k| over the elements for every pair of a head's query rows and keys: the
// product of the element-wise largest.
double LargestMagnitude(const SaliencyParams& params, int64_t head) {
  const TensorView& q = params.queries;
  const TensorView& k = params.keys;
  const int64_t group = q.heads / k.heads;
  double largest = 0;
  std::vector<double> key_max(k.dim, 0.0);
  for (int64_t j = 0; j < k.tokens; ++j) {
    for (int64_t e = 0; e < k.dim; ++e) {
      const double value = std::fabs(reference::Element(k.Row(head, j), k.dtype, e));
      key_max[e] = std::max(key_max[e], value);
    }
  }
  for (int64_t h = head * group; h < (head + 1) * group; ++h) {
    for (int64_t r = 0; r < q.tokens; ++r) {
      double sum = 0;
      for (int64_t e = 0; e < k.dim; ++e) {
        sum += std::fabs(reference::Element(q.Row(h, r), q.dtype, e)) * key_max[e];
      }
      largest = std::max(largest, sum);
    }
  }
  return largest;
}

}  // namespace

SaliencyBound::SaliencyBound(const SaliencyParams& params, bool half) {
  double lse = 0;
  for (int64_t i = 0; params.lse != nullptr && i < params.queries.heads * params.queries.tokens;
       ++i) {
    lse = std::max(lse, static_cast<double>(std::fabs(params.lse[i])));
  }
  for (int64_t head = 0; head < params.keys.heads; ++head) {
    const double scale = std::fabs(SaliencyScale(params, head));
    const double exponent = kUnit * ((static_cast<double>(params.keys.dim) + 8) * scale *
                                         LargestMagnitude(params, head) +
                                     2 * lse);
    const double single = std::expm1(2 * exponent) + (4 + 256 + 256 + 32) * kUnit;
    relative_.push_back(half ? (1 + single) * (1 + kHalfRelative) - 1 : single);
  }
  absolute_ = static_cast<double>(params.queries.heads) * std::ldexp(1.0, -126);
  if (half) {
    absolute_ += static_cast<double>(params.queries.heads / params.keys.heads) * kHalfSmallest;
  }
}

double SaliencyBound::Tolerance(int64_t head, double expected) const {
  return relative_[head] * expected + absolute_;
}

bool SaliencyBound::Holds(int64_t head, double actual, double expected) const {
  return std::fabs(actual - expected) <= Tolerance(head, expected);
}

}  // namespace structkv::testing
