#include "tests/kernels/rotation_bound.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "kernels/reference/element.h"

namespace structkv::testing {

std::vector<float> Frequencies(int64_t pairs, double theta) {
  std::vector<float> frequencies(static_cast<size_t>(pairs));
  for (int64_t j = 0; j < pairs; ++j) {
    frequencies[j] =
        static_cast<float>(std::pow(theta, -static_cast<double>(j) / static_cast<double>(pairs)));
  }
  return frequencies;
}

double UnitOf(DType dtype) {
  return std::ldexp(1.0, dtype == DType::kF32 ? -24 : dtype == DType::kF16 ? -11 : -8);
}

void ExpectRotated(const RotationParams& rotation, const TensorView& got, const TensorView& want,
                   const std::string& what) {
  const auto size = static_cast<int64_t>(DTypeSize(got.dtype));
  const int64_t end = rotation.offset + 2 * rotation.pairs;
  const auto at = [](const TensorView& view, int64_t head, int64_t row, int64_t element) {
    return reference::Element(view.Row(head, row), view.dtype, element);
  };
  for (int64_t h = 0; h < got.heads; ++h) {
    for (int64_t i = 0; i < got.tokens; ++i) {
      ASSERT_EQ(std::memcmp(got.Row(h, i), want.Row(h, i), rotation.offset * size), 0) << what;
      ASSERT_EQ(std::memcmp(got.Row(h, i) + end * size, want.Row(h, i) + end * size,
                            (got.dim - end) * size),
                0)
          << what;
      for (int64_t j = 0; j < rotation.pairs; ++j) {
        const bool halves = rotation.pairing == RotaryPairing::kHalfSplit;
        const int64_t first = rotation.offset + (halves ? j : 2 * j);
        const int64_t second = first + (halves ? rotation.pairs : 1);
        const double norm = std::hypot(at(want, h, i, first), at(want, h, i, second));
        for (const int64_t e : {first, second}) {
          const double expected = at(want, h, i, e);
          const double bound = 2 * UnitOf(got.dtype) * std::fabs(expected) +
                               8 * UnitOf(DType::kF32) * norm + std::ldexp(1.0, -24);
          ASSERT_NEAR(at(got, h, i, e), expected, bound)
              << what << ", head " << h << ", row " << i << ", element " << e;
        }
      }
    }
  }
}

}  // namespace structkv::testing
