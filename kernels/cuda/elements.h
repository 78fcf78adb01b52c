// Elements of keys and queries as float32 and back, by their bits.
#pragma once

#include <cstdint>

#include "kernels/cuda/numbers.h"
#include "kernels/tensor.h"

namespace structkv::cuda {

template <DType kType>
inline constexpr int kElementBytes = static_cast<int>(DTypeSize(kType));

// The value of an element of F32, F16 or BF16.
template <DType kType>
STRUCTKV_HOST_DEVICE inline float FromBits(uint32_t bits) {
  if constexpr (kType == DType::kF32) return FloatOf(bits);
  if constexpr (kType == DType::kF16) return HalfToFloat(bits);
  if constexpr (kType == DType::kBF16) return FloatOf(bits << 16);
}

// The nearest element, ties to even.
template <DType kType>
STRUCTKV_HOST_DEVICE inline uint32_t ToBits(float value) {
  if constexpr (kType == DType::kF32) return FloatBits(value);
  if constexpr (kType == DType::kF16) return FloatToHalf(value);
  if constexpr (kType == DType::kBF16) return FloatToBfloat(value);
}

}  // namespace structkv::cuda
