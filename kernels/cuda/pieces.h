// Pieces of 8 elements on their way from a key or query to the tensor cores, which take float16 or
// bfloat16. What is wider is cut into parts whose sum it is.
#pragma once

#include <cstdint>

#include "kernels/cuda/fragments.h"
#include "kernels/cuda/numbers.h"
#include "kernels/tensor.h"

namespace structkv::cuda {

// Which parts of keys and queries are multiplied with each other.
//   * float16 and bfloat16 by their own kind: as they are.
//   * 8-bit keys become the queries' kind, exactly. Under float32 queries both become bfloat16, the
//     query in three parts, exactly.
//   * float32 by float32: three bfloat16 parts each, exactly (8 bits of the significand to a part).
//     The product of the two smallest, below 2^-28 of |q k|, is left out.
template <DType kKey, DType kQuery>
struct Pieces {
  static constexpr DType kKeyType = kKey;
  static constexpr DType kQueryType = kQuery;
  static constexpr bool kHalf = kQuery == DType::kF16;
  static constexpr int kKeyParts = kKey == DType::kF32 ? 3 : 1;
  static constexpr int kQueryParts = kQuery == DType::kF32 ? 3 : 1;
  static constexpr int kKeyBytes = static_cast<int>(DTypeSize(kKey));
  // Words of a piece of a key, and pairs whose pieces are in flight together: 8 loads of a lane.
  static constexpr int kWords = kPieceDims * kKeyBytes / 4;
  static constexpr int kPairsInFlight = kKey == DType::kF32 ? 2 : 4;
};

// Three parts, largest first; those of a value that is not finite are not finite either.
STRUCTKV_HOST_DEVICE inline void Split(float value, float (&parts)[3]) {
  parts[0] = Truncated(value);
  const float rest = value - parts[0];
  parts[1] = Truncated(rest);
  parts[2] = Truncated(rest - parts[1]);
}

STRUCTKV_HOST_DEVICE inline void SplitPiece(const float (&values)[kPieceDims],
                                            uint32_t (&parts)[3][kPieceWords]) {
  STRUCTKV_UNROLL
  for (int i = 0; i < kPieceWords; ++i) {
    float low[3];
    float high[3];
    Split(values[2 * i], low);
    Split(values[2 * i + 1], high);
    STRUCTKV_UNROLL
    for (int part = 0; part < 3; ++part) parts[part][i] = UpperHalves(low[part], high[part]);
  }
}

// Two 8-bit elements, the lower and upper byte of `bytes`.
template <DType kKey, bool kHalf>
STRUCTKV_HOST_DEVICE inline uint32_t Widened(uint32_t bytes) {
  if constexpr (kKey == DType::kF8E5M2 && kHalf) {
    return (bytes & 0xFFU) << 8 | (bytes & 0xFF00U) << 16;
  } else if constexpr (kKey == DType::kF8E5M2) {
    return UpperHalves(E5M2ToFloat(bytes & 0xFFU), E5M2ToFloat(bytes >> 8 & 0xFFU));
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;"
        : "=r"(halves)
        : "h"(static_cast<unsigned short>(bytes & 0xFFFFU)));
    if constexpr (kHalf) return halves;
    return UpperHalves(HalfToFloat(halves & 0xFFFFU), HalfToFloat(halves >> 16));
#else
    const float low = E4M3ToFloat(bytes & 0xFFU);
    const float high = E4M3ToFloat(bytes >> 8 & 0xFFU);
    return kHalf ? Halves(low, high) : UpperHalves(low, high);
#endif
  }
}

// The parts of a piece of a key as the multiplication takes them.
template <class P>
STRUCTKV_HOST_DEVICE inline void KeyParts(const uint32_t (&raw)[P::kWords],
                                          uint32_t (&parts)[P::kKeyParts][kPieceWords]) {
  if constexpr (P::kKeyType == DType::kF32) {
    float values[kPieceDims];
    STRUCTKV_UNROLL
    for (int e = 0; e < kPieceDims; ++e) values[e] = FloatOf(raw[e]);
    SplitPiece(values, parts);
  } else {
    STRUCTKV_UNROLL
    for (int i = 0; i < kPieceWords; ++i) {
      if constexpr (P::kKeyBytes == 1) {
        parts[0][i] = Widened<P::kKeyType, P::kHalf>(raw[i / 2] >> (16 * (i % 2)) & 0xFFFFU);
      } else {
        parts[0][i] = raw[i];
      }
    }
  }
}

}  // namespace structkv::cuda
