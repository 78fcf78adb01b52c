// The 8-bit formats from their definition (OCP OFP8): sign, exponent and mantissa, worked out on
// their own.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

namespace structkv::testing {

// The value of a code; NaN and infinities as the format has them.
double DecodeFp8(uint8_t code, DType dtype);

// The nearest finite code, ties to the even one. Infinity, where the format has none, and NaN are
// NaN.
uint8_t EncodeFp8(float value, DType dtype);

}  // namespace structkv::testing
