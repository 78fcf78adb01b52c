#include "kernels/reference/element.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace structkv::reference {
namespace {

template <typename T>
T Load(const std::byte* row, int64_t index) {
  T value;
  std::memcpy(&value, row + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

double FromHalf(uint16_t bits) {
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  const int exponent = (bits >> 10) & 0x1F;
  const int fraction = bits & 0x3FF;
  if (exponent == 31) {
    return fraction == 0 ? sign * std::numeric_limits<double>::infinity()
                         : std::numeric_limits<double>::quiet_NaN();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(fraction + 1024, exponent - 25);
}

double FromBfloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

double FromE4M3(uint8_t bits) {
  const double sign = (bits & 0x80) != 0 ? -1.0 : 1.0;
  const int exponent = (bits >> 3) & 0xF;
  const int fraction = bits & 0x7;
  if ((bits & 0x7F) == 0x7F) return std::numeric_limits<double>::quiet_NaN();
  if (exponent == 0) return sign * std::ldexp(fraction, -9);
  return sign * std::ldexp(fraction + 8, exponent - 10);
}

template <typename T>
void Store(std::byte* row, int64_t index, T value) {
  std::memcpy(row + index * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
}

// IEEE 754 bits with so many of exponent and mantissa, 16 with the sign.
uint16_t ToBits(double value, int exponent_bits, int mantissa_bits) {
  const auto sign = static_cast<uint32_t>(std::signbit(value) ? 0x8000 : 0);
  const uint32_t infinity = ((1U << exponent_bits) - 1) << mantissa_bits;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) {
    return static_cast<uint16_t>(sign | infinity | (1U << (mantissa_bits - 1)));
  }
  if (std::isinf(value)) return static_cast<uint16_t>(sign | infinity);
  if (magnitude == 0) return static_cast<uint16_t>(sign);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  // That of the leading bit, or of the smallest normal number, below which steps stay the same.
  exponent = std::max(exponent - 1, 1 - bias);
  const auto steps =
      static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent)));
  // A normal number's leading bit, and what rounding carries, add to the exponent by themselves.
  const auto below = static_cast<uint32_t>(std::min(exponent + bias, 1 << exponent_bits) - 1);
  return static_cast<uint16_t>(sign | std::min((below << mantissa_bits) + steps, infinity));
}

}  // namespace

double Element(const std::byte* row, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kF32:
      return Load<float>(row, index);
    case DType::kF16:
      return FromHalf(Load<uint16_t>(row, index));
    case DType::kBF16:
      return FromBfloat(Load<uint16_t>(row, index));
    case DType::kF8E4M3:
      return FromE4M3(Load<uint8_t>(row, index));
    case DType::kF8E5M2:
      return FromHalf(static_cast<uint16_t>(Load<uint8_t>(row, index) << 8));
  }
  return std::numeric_limits<double>::quiet_NaN();
}

void SetElement(std::byte* row, DType dtype, int64_t index, double value) {
  switch (dtype) {
    case DType::kF32:
      return Store(row, index, static_cast<float>(value));
    case DType::kF16:
      return Store(row, index, ToBits(value, 5, 10));
    case DType::kBF16:
      return Store(row, index, ToBits(value, 8, 7));
    case DType::kF8E4M3:
    case DType::kF8E5M2:
      return;  // never written
  }
}

}  // namespace structkv::reference
