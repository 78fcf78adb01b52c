// Dot products of keys and packed query rows in float32. Query rows are the lanes; each key element
// is broadcast. Compiled once per instruction set.
#include <cstring>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/cpu/kernel_table.h"

#if defined(STRUCTKV_KERNELS_CPU_SCORES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef STRUCTKV_KERNELS_CPU_SCORES_INL_H_
#undef STRUCTKV_KERNELS_CPU_SCORES_INL_H_
#else
#define STRUCTKV_KERNELS_CPU_SCORES_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace structkv::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Loads without asking for any alignment.
template <class D>
HWY_INLINE hn::Vec<D> LoadBytes(D d, const std::byte* p) {
#if HWY_TARGET == HWY_SCALAR
  hn::TFromD<D> value;
  std::memcpy(&value, p, sizeof(value));
  hn::Vec<D> v;
  v.raw = value;
  return v;
#else
  return hn::LoadU(d, reinterpret_cast<const hn::TFromD<D>*>(p));
#endif
}

HWY_INLINE float LoadFloat(const std::byte* p) {
  float value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

template <class D>
HWY_INLINE hn::Vec<D> PromoteHalf(D d, const std::byte* in) {
#if HWY_TARGET <= HWY_AVX2 || HWY_TARGET == HWY_NEON
  return hn::PromoteTo(d, LoadBytes(hn::Rebind<hwy::float16_t, D>(), in));
#else
  // Highway's own emulation takes Inf and NaN for numbers.
  const hn::RebindToUnsigned<D> du;
  const auto bits = hn::PromoteTo(du, LoadBytes(hn::Rebind<uint16_t, D>(), in));
  const auto magnitude = hn::ShiftLeft<13>(hn::And(bits, hn::Set(du, 0x7FFFU)));
  // 2^112 makes up for the difference of the exponents' biases, denormals included.
  const auto value = hn::Mul(hn::BitCast(d, magnitude), hn::Set(d, 5.192296858534828e33F));
  const hn::RebindToSigned<D> di;
  const auto special = hn::BitCast(
      du, hn::VecFromMask(di, hn::Gt(hn::BitCast(di, magnitude), hn::Set(di, 0x0F7FFFFF))));
  const auto exponent = hn::And(special, hn::Set(du, 0x7F800000U));
  const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(du, 0x8000U)));
  return hn::BitCast(d, hn::Or(hn::Or(hn::BitCast(du, value), exponent), sign));
#endif
}

// An 8-bit format with kMantissa bits of mantissa and an exponent biased by kBias, in which codes
// from kFirstSpecial on are infinite or NaN (their sign aside).
template <int kMantissa, int kBias, int kFirstSpecial, class D>
HWY_INLINE hn::Vec<D> PromoteFp8(D d, const std::byte* in) {
  const hn::RebindToUnsigned<D> du;
  const hn::RebindToSigned<D> di;
  const auto bits = hn::PromoteTo(du, LoadBytes(hn::Rebind<uint8_t, D>(), in));
  const auto code = hn::And(bits, hn::Set(du, 0x7FU));
  const auto sign = hn::ShiftLeft<24>(hn::Xor(bits, code));
  const auto shifted = hn::ShiftLeft<23 - kMantissa>(code);
  const auto normal = hn::Add(shifted, hn::Set(du, static_cast<uint32_t>(127 - kBias) << 23));
  const auto special = hn::Or(shifted, hn::Set(du, 0x7F800000U));
  // Denormals by way of integers: arithmetic on float32's own is slow.
  constexpr float kUnit = 1.0F / (1 << (kBias - 1 + kMantissa));
  const auto small = hn::Mul(hn::ConvertTo(d, hn::BitCast(di, code)), hn::Set(d, kUnit));
  const auto value =
      hn::IfThenElse(hn::RebindMask(du, hn::Lt(hn::BitCast(di, code), hn::Set(di, 1 << kMantissa))),
                     hn::BitCast(du, small), normal);
  const auto magnitude = hn::IfThenElse(
      hn::RebindMask(du, hn::Gt(hn::BitCast(di, code), hn::Set(di, kFirstSpecial - 1))), special,
      value);
  return hn::BitCast(d, hn::Or(magnitude, sign));
}

template <class D>
HWY_INLINE int64_t Promote(D d, DType dtype, const std::byte* in, int64_t begin, int64_t count,
                           float* out) {
  const hn::Rebind<hwy::bfloat16_t, D> bfloat;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = begin;
  if (dtype == DType::kF16) {
    for (; i + lanes <= count; i += lanes) hn::StoreU(PromoteHalf(d, in + 2 * i), d, out + i);
  } else if (dtype == DType::kF8E4M3) {
    for (; i + lanes <= count; i += lanes) {
      hn::StoreU(PromoteFp8<3, 7, 0x7F>(d, in + i), d, out + i);
    }
  } else if (dtype == DType::kF8E5M2) {
    for (; i + lanes <= count; i += lanes) {
      hn::StoreU(PromoteFp8<2, 15, 0x7C>(d, in + i), d, out + i);
    }
  } else {
    for (; i + lanes <= count; i += lanes) {
      hn::StoreU(hn::PromoteTo(d, LoadBytes(bfloat, in + 2 * i)), d, out + i);
    }
  }
  return i;
}

inline void ToF32(const std::byte* in, DType dtype, int64_t count, float* out) {
  if (dtype == DType::kF32) {
    std::memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  int64_t i = Promote(hn::ScalableTag<float>(), dtype, in, 0, count, out);
  i = Promote(hn::CappedTag<float, 8>(), dtype, in, i, count, out);
  Promote(hn::CappedTag<float, 1>(), dtype, in, i, count, out);
}

inline void CopyKeys(const KeyRows& rows) {
  const hn::ScalableTag<uint8_t> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t bytes = rows.dim * static_cast<int64_t>(DTypeSize(rows.dtype));
  auto* to = reinterpret_cast<uint8_t*>(rows.out);
  for (int64_t t = 0; t < rows.tokens; ++t, to += bytes) {
    const auto* from = reinterpret_cast<const uint8_t*>(rows.rows[t]);
    int64_t b = 0;
    for (; b + lanes <= bytes; b += lanes) hn::StoreU(hn::LoadU(d, from + b), d, to + b);
    if (b < bytes) std::memcpy(to + b, from + b, static_cast<size_t>(bytes - b));
  }
}

// Keys that are asked for while others are scored; null: none.
struct KeysAhead {
  const std::byte* near = nullptr;
  const std::byte* far = nullptr;
};

// T tokens against R vectors of rows. `ahead` is prefetched, in step with `keys`.
template <int T, int R, class D>
HWY_INLINE void DotBlock(D d, const float* HWY_RESTRICT queries, int64_t rows,
                         const std::byte* keys, int64_t stride, const KeysAhead& ahead, int64_t dim,
                         float* HWY_RESTRICT out) {
  using V = hn::Vec<D>;
  constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(D()));
  V acc[T][R];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[t][r] = hn::Zero(d);
  }
  for (int64_t i = 0; i < dim; i += 8) {
    if (ahead.near != nullptr && i % 16 == 0) {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const int64_t offset = t * stride + i * static_cast<int64_t>(sizeof(float));
        __builtin_prefetch(ahead.far + offset, 0, 2);
        hwy::Prefetch(ahead.near + offset);
      }
    }
#pragma GCC unroll 2
    for (int64_t e = i; e < i + 8; ++e) {
      V q[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) q[r] = hn::Load(d, queries + e * rows + r * kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const V k =
            hn::Set(d, LoadFloat(keys + t * stride + e * static_cast<int64_t>(sizeof(float))));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[t][r] = hn::MulAdd(q[r], k, acc[t][r]);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) hn::Store(acc[t][r], d, out + t * rows + r * kLanes);
  }
}

// All rows of the tile against T tokens, R vectors at a time.
template <int T, int R>
HWY_INLINE void DotRows(const ScoreTile& tile, const std::byte* keys, int64_t stride,
                        const KeysAhead& ahead, float* out) {
  const hn::ScalableTag<float> d;
  constexpr int64_t kStep = R * static_cast<int64_t>(hn::MaxLanes(d));
  const float* queries = static_cast<const float*>(tile.queries);
  for (int64_t r = 0; r < tile.rows; r += kStep) {
    DotBlock<T, R>(d, queries + r, tile.rows, keys, stride, r == 0 ? ahead : KeysAhead(), tile.dim,
                   out + r);
  }
}

template <int R>
void ScoresR(const ScoreTile& tile) {
#if HWY_TARGET <= HWY_AVX3
  constexpr int kBlock = 12;  // 24 accumulators of 32 registers
#elif HWY_TARGET == HWY_SCALAR
  constexpr int kBlock = 1;
#else
  constexpr int kBlock = 6;  // 12 accumulators of 16 registers
#endif
  const int64_t element = static_cast<int64_t>(DTypeSize(tile.dtype));
  const int64_t near_tokens = kKeysNearBytes / (tile.dim * element);
  const int64_t far_tokens = kKeysFarBytes / (tile.dim * element);
  // Narrower keys are converted a block at a time.
  HWY_ALIGN float converted[kBlock * 576];
  for (int64_t t = 0; t < tile.tokens;) {
    const bool whole = tile.tokens - t >= kBlock;
    const int64_t count = whole ? kBlock : 1;
    const std::byte* keys = tile.keys + t * tile.token_stride_bytes;
    const int64_t last = tile.tokens + tile.tokens_after - count - t;
    KeysAhead ahead = {keys + HWY_MIN(last, near_tokens) * tile.token_stride_bytes,
                       keys + HWY_MIN(last, far_tokens) * tile.token_stride_bytes};
    int64_t stride = tile.token_stride_bytes;
    if (tile.ask != nullptr) {
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t line = 0; line < tile.dim * tile.ask_element_bytes; line += 64) {
          __builtin_prefetch(tile.ask[t + c] + line, 0, 2);
        }
      }
      ahead = {};
    }
    if (tile.dtype != DType::kF32) {
      for (int64_t c = 0; c < count; ++c) {
        const int64_t row = c * tile.token_stride_bytes;
        for (int64_t line = 0; ahead.near != nullptr && line < tile.dim * element; line += 64) {
          __builtin_prefetch(ahead.far + row + line, 0, 2);
          hwy::Prefetch(ahead.near + row + line);
        }
        ToF32(keys + row, tile.dtype, tile.dim, converted + c * tile.dim);
      }
      keys = reinterpret_cast<const std::byte*>(converted);
      stride = tile.dim * static_cast<int64_t>(sizeof(float));
      ahead = {};
    }
    float* out = static_cast<float*>(tile.out) + t * tile.rows;
    if (whole) {
      DotRows<kBlock, R>(tile, keys, stride, ahead, out);
    } else {
      DotRows<1, R>(tile, keys, stride, KeysAhead(), out);
    }
    t += count;
  }
}

inline void Scores(const ScoreTile& tile) {
  constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(hn::ScalableTag<float>()));
  if (tile.rows % (2 * kLanes) == 0) {
    ScoresR<2>(tile);
  } else {
    ScoresR<1>(tile);
  }
}

}  // namespace structkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
