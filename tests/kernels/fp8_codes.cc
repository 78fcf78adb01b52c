#include "tests/kernels/fp8_codes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace structkv::testing {
namespace {

// Magnitudes of the finite codes, which ascend with them.
const std::vector<double>& Magnitudes(DType dtype) {
  const auto make = [](DType of) {
    std::vector<double> magnitudes;
    for (int code = 0; code < 128; ++code) {
      const double value = DecodeFp8(static_cast<uint8_t>(code), of);
      if (std::isfinite(value)) magnitudes.push_back(value);
    }
    return magnitudes;
  };
  static const auto* const e4m3 = new std::vector<double>(make(DType::kF8E4M3));
  static const auto* const e5m2 = new std::vector<double>(make(DType::kF8E5M2));
  return dtype == DType::kF8E4M3 ? *e4m3 : *e5m2;
}

}  // namespace

double DecodeFp8(uint8_t code, DType dtype) {
  const bool e4m3 = dtype == DType::kF8E4M3;
  const int exponent_bits = e4m3 ? 4 : 5;
  const int mantissa_bits = 7 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (code & 0x7F) >> mantissa_bits;
  const double fraction = std::ldexp(code % (1 << mantissa_bits), -mantissa_bits);
  double magnitude =
      exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1.0 + fraction, exponent - bias);
  if (e4m3 && (code & 0x7F) == 0x7F) magnitude = std::numeric_limits<double>::quiet_NaN();
  if (!e4m3 && exponent == 31) {
    magnitude = fraction == 0 ? std::numeric_limits<double>::infinity()
                              : std::numeric_limits<double>::quiet_NaN();
  }
  return code >= 128 ? -magnitude : magnitude;
}

uint8_t EncodeFp8(float value, DType dtype) {
  const int sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return static_cast<uint8_t>(sign | 0x7F);
  if (std::isinf(value)) {
    return static_cast<uint8_t>(sign | (dtype == DType::kF8E4M3 ? 0x7F : 0x7C));
  }
  const std::vector<double>& magnitudes = Magnitudes(dtype);
  const double magnitude = std::fabs(static_cast<double>(value));
  const auto above = std::lower_bound(magnitudes.begin(), magnitudes.end(), magnitude);
  auto code = static_cast<int>(above - magnitudes.begin());
  if (above == magnitudes.end()) {
    --code;
  } else if (code > 0) {
    const double up = *above - magnitude;
    const double down = magnitude - magnitudes[code - 1];
    if (down < up || (down == up && code % 2 == 1)) --code;
  }
  return static_cast<uint8_t>(sign | code);
}

}  // namespace structkv::testing
