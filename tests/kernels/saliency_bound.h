// How far a float32 saliency may lie from the double-precision one.
#pragma once

#include <vector>

#include "kernels/backend.h"

namespace structkv::testing {

// What a backend may be off by, from the rounding of float32 alone, with u = 2^-24:
//   * a score is a sum of `dim` products: (dim + 8) u times the scaled sum of their absolute values
//     (8: products, the scale, the subtraction of the maximum, each at most a few u of the score);
//   * a caller's log-sum-exp is rounded once or twice: 2 u times its absolute value;
//   * an error e of an exponent is a factor of exp(e), once for the weight and once for the sum
//     that it is divided by;
//   * exp itself: 4 u; sums of at most 256 positive terms before they are widened: 256 u, twice
//     (row sums, rows of a group); a few roundings more: 32 u.
// Weights below 2^-126 of their row's maximum may be 0.
//
// `half`: weights are kept as float16 between two passes. A weight is then off by 2^-11 of itself,
// and so may the sum be that it is divided by; where it is below 2^-14 of the highest within its 16
// tokens, by 2^-25 of that, which is at most 1 for each of the group's heads, and 16 such errors
// are in the 16 tokens of a sum whose largest term is 1.
class SaliencyBound {
 public:
  explicit SaliencyBound(const SaliencyParams& params, bool half = false);

  // Whether `actual` is as near to `expected`, the saliency of a token in head `head`, as it must.
  bool Holds(int64_t head, double actual, double expected) const;
  double Tolerance(int64_t head, double expected) const;

 private:
  std::vector<double> relative_;  // [kv_heads]
  double absolute_ = 0;
};

}  // namespace structkv::testing
