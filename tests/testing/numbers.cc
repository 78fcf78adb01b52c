#include "tests/testing/numbers.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

namespace structkv::testkit {
namespace {

uint16_t ToHalf(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | 0x7e00;
  if (std::isinf(value)) return sign | 0x7c00;
  if (value == 0) return sign;
  int exponent = 0;
  const float fraction = std::frexp(std::fabs(value), &exponent);  // [0.5, 1)
  const auto mantissa = static_cast<uint16_t>(std::lround((fraction * 2 - 1) * 1024));
  return static_cast<uint16_t>(sign | ((exponent - 1 + 15) << 10 | mantissa));
}

double FromHalf(uint16_t bits) {
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

// What an fp8 code stands for, from the format's definition.
double FromF8(v1::DType dtype, uint8_t code) {
  const int mantissa_bits = dtype == v1::DTYPE_F8_E4M3 ? 3 : 2;
  const int bias = dtype == v1::DTYPE_F8_E4M3 ? 7 : 15;
  const double sign = (code & 0x80) != 0 ? -1 : 1;
  const int exponent = (code & 0x7f) >> mantissa_bits;
  const int mantissa = code & ((1 << mantissa_bits) - 1);
  const double fraction = std::ldexp(mantissa, -mantissa_bits);
  if (dtype == v1::DTYPE_F8_E4M3 && (code & 0x7f) == 0x7f) return NAN;
  if (dtype == v1::DTYPE_F8_E5M2 && exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1 + fraction, exponent - bias);
}

// What the codes of positive numbers stand for, ascending; without those of NaN.
std::vector<double> F8Magnitudes(v1::DType dtype) {
  std::vector<double> values;
  for (int code = 0; code < 0x80; ++code) {
    const double value = FromF8(dtype, static_cast<uint8_t>(code));
    if (!std::isnan(value)) values.push_back(value);
  }
  return values;
}

uint8_t ToF8(v1::DType dtype, float value) {
  static const std::vector<double> e4m3 = F8Magnitudes(v1::DTYPE_F8_E4M3);
  static const std::vector<double> e5m2 = F8Magnitudes(v1::DTYPE_F8_E5M2);
  if (std::isnan(value)) return 0x7f;
  const std::vector<double>& values = dtype == v1::DTYPE_F8_E4M3 ? e4m3 : e5m2;
  const double magnitude = std::fabs(value);
  auto nearest = std::lower_bound(values.begin(), values.end() - 1, magnitude);
  if (*nearest != magnitude && nearest != values.begin() &&
      magnitude - *(nearest - 1) <= *nearest - magnitude) {
    --nearest;
  }
  const auto code = static_cast<uint8_t>(nearest - values.begin());
  return std::signbit(value) ? code | 0x80 : code;
}

// The element's bytes, little-endian; `size` gets their count.
uint32_t ToBits(v1::DType dtype, float value) {
  switch (dtype) {
    case v1::DTYPE_F16:
      return ToHalf(value);
    case v1::DTYPE_BF16:
      return std::bit_cast<uint32_t>(value) >> 16;
    case v1::DTYPE_F8_E4M3:
    case v1::DTYPE_F8_E5M2:
      return ToF8(dtype, value);
    default:
      return std::bit_cast<uint32_t>(value);
  }
}

}  // namespace

uint64_t Random::Next() {
  uint64_t z = (state_ += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

int64_t Random::Between(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(Next() % static_cast<uint64_t>(high - low + 1));
}

size_t ElementBytes(v1::DType dtype) {
  if (dtype == v1::DTYPE_F8_E4M3 || dtype == v1::DTYPE_F8_E5M2) return 1;
  return dtype == v1::DTYPE_F32 ? 4 : 2;
}

void AppendElement(v1::DType dtype, float value, std::string* out) {
  const uint32_t bits = ToBits(dtype, value);
  out->append(reinterpret_cast<const char*>(&bits), ElementBytes(dtype));
}

double ElementAt(v1::DType dtype, const std::string& data, size_t index) {
  uint32_t bits = 0;
  std::memcpy(&bits, data.data() + index * ElementBytes(dtype), ElementBytes(dtype));
  switch (dtype) {
    case v1::DTYPE_F16:
      return FromHalf(static_cast<uint16_t>(bits));
    case v1::DTYPE_BF16:
      return std::bit_cast<float>(bits << 16);
    case v1::DTYPE_F8_E4M3:
    case v1::DTYPE_F8_E5M2:
      return FromF8(dtype, static_cast<uint8_t>(bits));
    default:
      return std::bit_cast<float>(bits);
  }
}

void SetElement(v1::DType dtype, float value, size_t index, std::string* data) {
  const uint32_t bits = ToBits(dtype, value);
  std::memcpy(data->data() + index * ElementBytes(dtype), &bits, ElementBytes(dtype));
}

}  // namespace structkv::testkit
