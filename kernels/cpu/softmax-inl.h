// Softmax over score tiles [token, row], rows as lanes, and the sum over rows. Compiled once per
// instruction set.
#include "hwy/highway.h"
#include "kernels/cpu/exp2-inl.h"
#include "kernels/cpu/kernel_table.h"

#if defined(STRUCTKV_KERNELS_CPU_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef STRUCTKV_KERNELS_CPU_SOFTMAX_INL_H_
#undef STRUCTKV_KERNELS_CPU_SOFTMAX_INL_H_
#else
#define STRUCTKV_KERNELS_CPU_SOFTMAX_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace structkv::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

inline bool RowMax(const float* scores, int64_t tokens, int64_t rows, float factor, float* max) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const V scale = hn::Set(d, factor);
  V poison = hn::Zero(d);  // x * 0 is NaN where x is not finite, and stays
  for (int64_t r = 0; r < rows; r += lanes) {
    V top = hn::Mul(hn::Load(d, scores + r), scale);
    for (int64_t t = 0; t < tokens; ++t) {
      const V s = hn::Mul(hn::Load(d, scores + t * rows + r), scale);
      poison = hn::MulAdd(s, hn::Zero(d), poison);
      top = hn::Max(top, s);
    }
    hn::StoreU(top, d, max + r);
  }
  return hn::AllTrue(d, hn::Eq(poison, hn::Zero(d)));
}

inline bool Exponentiate(float* scores, int64_t tokens, int64_t rows, float factor,
                         const float* shift, float* sum) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const V scale = hn::Set(d, factor);
  V poison = hn::Zero(d);
  for (int64_t r = 0; r < rows; r += lanes) {
    const V minus = hn::LoadU(d, shift + r);
    V total = hn::Zero(d);
    V check = hn::Zero(d);  // infinities stay visible here; their exponentials may be 0
    float* at = scores + r;
    for (int64_t t = 0; t < tokens; ++t, at += rows) {
      // Rounded as RowMax does: what is not above its maximum stays so, however large it is.
      const V x = hn::Sub(hn::Mul(hn::Load(d, at), scale), minus);
      const V p = Exp2(d, x);
      hn::Store(p, d, at);
      total = hn::Add(total, p);
      check = hn::Add(check, x);
    }
    hn::StoreU(total, d, sum + r);
    poison = hn::MulAdd(check, hn::Zero(d), poison);
  }
  return hn::AllTrue(d, hn::Eq(poison, hn::Zero(d)));
}

// The larger of two vectors' lanes, or their sum.
template <bool kMax, class V>
HWY_INLINE V Joined(V a, V b) {
  if constexpr (kMax) {
    return hn::Max(a, b);
  } else {
    return hn::Add(a, b);
  }
}

// Lane k of the result is the lanes of row(first + k) joined, of COUNT rows that are a power of
// two. In the order in which few vectors are alive.
template <bool kMax, int kCount, class D, class Row>
HWY_INLINE hn::Vec<D> JoinEach(D d, int64_t first, const Row& row) {
#if HWY_TARGET == HWY_SCALAR
  return row(first);
#else
  if constexpr (kCount == 1) {
    return row(first);
  } else {
    const auto lo = JoinEach<kMax, kCount / 2>(d, first, row);
    const auto hi = JoinEach<kMax, kCount / 2>(d, first + kCount / 2, row);
    return Joined<kMax>(hn::ConcatEven(d, hi, lo), hn::ConcatOdd(d, hi, lo));
  }
#endif
}

inline void ToHalf(const float* in, int64_t count, uint16_t* out) {
  const hn::ScalableTag<float> d;
  const hn::Rebind<hwy::float16_t, decltype(d)> half;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  auto* to = reinterpret_cast<hwy::float16_t*>(out);
  for (int64_t i = 0; i < count; i += lanes) {
    hn::StoreU(hn::DemoteTo(half, hn::LoadU(d, in + i)), half, to + i);
  }
}

// What is stored, as float32.
template <class D>
HWY_INLINE hn::Vec<D> LoadRows(D d, const float* p) {
  return hn::Load(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> LoadRows(D d, const uint16_t* p) {
  const hn::Rebind<hwy::float16_t, D> half;
  return hn::PromoteTo(d, hn::LoadU(half, reinterpret_cast<const hwy::float16_t*>(p)));
}

// N vectors of rows.
template <bool kMax, int N, class T>
void WeighRowsN(const T* p, int64_t tokens, const float* weight, bool accumulate, float* out) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(d));
  constexpr int64_t kRows = N * kLanes;
  V w[N];
#pragma GCC unroll 32
  for (int n = 0; n < N; ++n) w[n] = hn::LoadU(d, weight + n * kLanes);
  const auto weighed = [&](int64_t t) HWY_ATTR {
    V v = hn::Zero(d);
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) {
      const V each = LoadRows(d, p + t * kRows + n * kLanes);
      v = kMax ? hn::Max(hn::Mul(each, w[n]), v) : hn::MulAdd(each, w[n], v);
    }
    return v;
  };
  int64_t t = 0;
  for (; t + kLanes <= tokens; t += kLanes) {
    V joined = JoinEach<kMax, kLanes>(d, t, weighed);
    if (accumulate) joined = Joined<kMax>(joined, hn::LoadU(d, out + t));
    hn::StoreU(joined, d, out + t);
  }
  if (t == tokens) return;
  V joined = JoinEach<kMax, kLanes>(
      d, t, [&](int64_t each) HWY_ATTR { return each < tokens ? weighed(each) : hn::Zero(d); });
  HWY_ALIGN float rest[kLanes] = {};
  if (accumulate) {
    std::copy(out + t, out + tokens, rest);
    joined = Joined<kMax>(joined, hn::Load(d, rest));
  }
  hn::Store(joined, d, rest);
  std::copy(rest, rest + (tokens - t), out + t);
}

template <bool kMax, class T>
void WeighRowsOf(const T* p, int64_t tokens, int64_t rows, const float* weight, bool accumulate,
                 float* out) {
  constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(hn::ScalableTag<float>()));
  const auto call = [&](auto* function) { function(p, tokens, weight, accumulate, out); };
  if (rows == 32) return call(&WeighRowsN<kMax, 32 / kLanes, T>);
  if (rows == 16) return call(&WeighRowsN<kMax, 16 / kLanes, T>);
#if HWY_TARGET > HWY_AVX3
  if (rows == 24) return call(&WeighRowsN<kMax, 24 / kLanes, T>);
  if (rows == 8) return call(&WeighRowsN<kMax, 8 / kLanes, T>);
#endif
}

inline void WeighRows(const float* p, int64_t tokens, int64_t rows, const float* weight,
                      bool maximum, bool accumulate, float* out) {
  const auto of = maximum ? &WeighRowsOf<true, float> : &WeighRowsOf<false, float>;
  of(p, tokens, rows, weight, accumulate, out);
}

inline void WeighHalfRows(const uint16_t* p, int64_t tokens, int64_t rows, const float* weight,
                          bool maximum, bool accumulate, float* out) {
  const auto of = maximum ? &WeighRowsOf<true, uint16_t> : &WeighRowsOf<false, uint16_t>;
  of(p, tokens, rows, weight, accumulate, out);
}

inline void TileWeights(float* max, const float* sums, int64_t tiles, int64_t rows,
                        const float* share) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(d));
  for (int64_t r = 0; r < rows; r += kLanes) {
    V top = hn::LoadU(d, max + r);
    for (int64_t i = 1; i < tiles; ++i) top = hn::Max(top, hn::LoadU(d, max + i * rows + r));
    double total[kLanes] = {};
    for (int64_t i = 0; i < tiles; ++i) {
      float* at = max + i * rows + r;
      // In two factors: exponentials of up to kLargestSum are multiplied with this, so below 2^-126
      // it may lose digits, but is not simply 0.
      const V below = hn::Sub(hn::LoadU(d, at), top);
      const V far = hn::Min(hn::Add(below, hn::Set(d, 100.0F)), hn::Zero(d));
      const V share_of_top = hn::Mul(Exp2(d, hn::Max(below, hn::Set(d, -100.0F))), Exp2(d, far));
      hn::StoreU(share_of_top, d, at);
      HWY_ALIGN float part[kLanes];
      hn::Store(hn::Mul(share_of_top, hn::LoadU(d, sums + i * rows + r)), d, part);
      for (int64_t k = 0; k < kLanes; ++k) total[k] += static_cast<double>(part[k]);
    }
    HWY_ALIGN float factor[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) {
      factor[k] = static_cast<float>(static_cast<double>(share[r + k]) / total[k]);
    }
    const V f = hn::Load(d, factor);
    for (int64_t i = 0; i < tiles; ++i) {
      float* at = max + i * rows + r;
      hn::StoreU(hn::Mul(hn::LoadU(d, at), f), d, at);
    }
  }
}

}  // namespace structkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
