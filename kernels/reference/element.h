// Decoding and encoding of single elements, bit by bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"

namespace structkv::reference {

// The element `index` of a row of `dtype`. `row` needs no alignment.
double Element(const std::byte* row, DType dtype, int64_t index);

// Sets it to the nearest value of `dtype`, ties to even; what is too large becomes infinite.
// Not for 8-bit types.
void SetElement(std::byte* row, DType dtype, int64_t index, double value);

}  // namespace structkv::reference
