// Decoding of single elements, bit by bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"

namespace structkv::reference {

// The element `index` of a row of `dtype`. `row` needs no alignment.
double Element(const std::byte* row, DType dtype, int64_t index);

}  // namespace structkv::reference
