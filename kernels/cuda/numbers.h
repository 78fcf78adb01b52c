// Conversions between element types, and arithmetic that is rounded once per operation. By the
// device's instructions in a kernel, by hand on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/host_device.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace structkv::cuda {

// 16 and 8 bytes that are loaded and stored at once.
struct alignas(16) Words4 {
  uint32_t w[4];
};
struct alignas(8) Words2 {
  uint32_t w[2];
};
struct alignas(8) Floats2 {
  float x;
  float y;
};

STRUCTKV_HOST_DEVICE inline uint32_t FloatBits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

STRUCTKV_HOST_DEVICE inline float FloatOf(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

STRUCTKV_HOST_DEVICE inline bool IsFinite(float value) {
  return (FloatBits(value) & 0x7F800000U) != 0x7F800000U;
}

STRUCTKV_HOST_DEVICE inline float HalfToFloat(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
#else
  const uint32_t sign = (bits & 0x8000U) << 16;
  const uint32_t rest = bits & 0x7FFFU;
  if (rest >= 0x7C00U) return FloatOf(sign | 0x7F800000U | ((rest & 0x3FFU) << 13));
  // Half's bits in the place of a float's stand for 2^-112 of its value, denormal ones too.
  return FloatOf(sign | FloatBits(std::ldexp(FloatOf(rest << 13), 112)));
#endif
}

// Ties to even.
STRUCTKV_HOST_DEVICE inline uint32_t FloatToHalf(float value) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t sign = FloatBits(value) >> 16 & 0x8000U;
  const float size = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7E00U;
  if (size >= 65520.0F) return sign | 0x7C00U;
  if (size < 6.103515625e-05F) {  // 2^-14: steps of 2^-24
    return sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 24)));
  }
  const uint32_t bits = FloatBits(size) - 0x38000000U;
  return sign | ((bits + 0xFFFU + ((bits >> 13) & 1U)) >> 13);
#endif
}

// Ties to even.
STRUCTKV_HOST_DEVICE inline uint32_t FloatToBfloat(float value) {
#ifdef __CUDA_ARCH__
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = FloatBits(value);
  if (std::isnan(value)) return bits >> 16 | 0x40U;
  return (bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16;
#endif
}

// OCP OFP8. e4m3's bits in the place of a half's stand for 2^-8 of its value.
STRUCTKV_HOST_DEVICE inline float E4M3ToFloat(uint32_t byte) {
  if ((byte & 0x7FU) == 0x7FU) return FloatOf(0x7FC00000U);
  return 256.0F * HalfToFloat(((byte & 0x80U) << 8) | ((byte & 0x7FU) << 7));
}
STRUCTKV_HOST_DEVICE inline float E5M2ToFloat(uint32_t byte) { return HalfToFloat(byte << 8); }

// Two bf16 in a word from the upper halves of floats: exact where their lower halves are zero.
STRUCTKV_HOST_DEVICE inline uint32_t UpperHalves(float low, float high) {
#ifdef __CUDA_ARCH__
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
#else
  return FloatBits(low) >> 16 | (FloatBits(high) & 0xFFFF0000U);
#endif
}
STRUCTKV_HOST_DEVICE inline float Truncated(float value) {
  return FloatOf(FloatBits(value) & 0xFFFF0000U);
}
// Two float16 in a word, ties to even.
STRUCTKV_HOST_DEVICE inline uint32_t Halves(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t halves;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
  return halves;
#else
  return FloatToHalf(low) | FloatToHalf(high) << 16;
#endif
}

// 2^x within 2 units in the last place; results below 2^-126 may be 0.
STRUCTKV_HOST_DEVICE inline float Exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

STRUCTKV_HOST_DEVICE inline float AddRounded(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
STRUCTKV_HOST_DEVICE inline float MultiplyRounded(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

}  // namespace structkv::cuda
