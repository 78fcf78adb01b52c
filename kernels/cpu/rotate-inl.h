// Rotation of keys to other positions. Compiled once per instruction set.
#include <cstring>

#include "hwy/highway.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/scores-inl.h"

#if defined(STRUCTKV_KERNELS_CPU_ROTATE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef STRUCTKV_KERNELS_CPU_ROTATE_INL_H_
#undef STRUCTKV_KERNELS_CPU_ROTATE_INL_H_
#else
#define STRUCTKV_KERNELS_CPU_ROTATE_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace structkv::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Cosine and sine of `angle`, in double precision, to what float32 can tell apart.
template <class D, class V = hn::Vec<D>>
HWY_INLINE void CosSin(D d, V angle, V* cosine, V* sine) {
  // Quarter turns. Their number times the upper part, of 33 bits, is exact up to a million of them.
  const V turns = hn::Round(hn::Mul(angle, hn::Set(d, 0.63661977236758134308)));
  V r = hn::NegMulAdd(turns, hn::Set(d, 1.57079632673412561417), angle);
  r = hn::NegMulAdd(turns, hn::Set(d, 6.07710050650619224932e-11), r);
  // Taylor series; with |r| <= pi / 4 what is left out is below 2e-9 and 2e-10.
  const V r2 = hn::Mul(r, r);
  V s = hn::MulAdd(hn::Set(d, 1.0 / 362880), r2, hn::Set(d, -1.0 / 5040));
  s = hn::MulAdd(s, r2, hn::Set(d, 1.0 / 120));
  s = hn::MulAdd(s, r2, hn::Set(d, -1.0 / 6));
  s = hn::MulAdd(hn::Mul(s, r2), r, r);
  V c = hn::MulAdd(hn::Set(d, -1.0 / 3628800), r2, hn::Set(d, 1.0 / 40320));
  c = hn::MulAdd(c, r2, hn::Set(d, -1.0 / 720));
  c = hn::MulAdd(c, r2, hn::Set(d, 1.0 / 24));
  c = hn::MulAdd(c, r2, hn::Set(d, -0.5));
  c = hn::MulAdd(c, r2, hn::Set(d, 1.0));
  // 0 .. 3
  const V quarter =
      hn::NegMulAdd(hn::Floor(hn::Mul(turns, hn::Set(d, 0.25))), hn::Set(d, 4.0), turns);
  const auto first = hn::Eq(quarter, hn::Set(d, 1.0));
  const auto odd = hn::Or(first, hn::Eq(quarter, hn::Set(d, 3.0)));
  const auto second = hn::Eq(quarter, hn::Set(d, 2.0));
  const V x = hn::IfThenElse(odd, s, c);
  const V y = hn::IfThenElse(odd, c, s);
  *cosine = hn::IfThenElse(hn::Or(first, second), hn::Neg(x), x);
  *sine = hn::IfThenElse(hn::Ge(quarter, hn::Set(d, 2.0)), hn::Neg(y), y);
}

template <class D>
HWY_INLINE int64_t FillAngles(D d, const RotaryAngles& angles, int64_t begin) {
  const hn::Rebind<float, D> narrow;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto new_position = hn::Set(narrow, static_cast<float>(angles.new_position));
  const auto position = hn::Set(narrow, static_cast<float>(angles.position));
  int64_t j = begin;
  for (; j + lanes <= angles.pairs; j += lanes) {
    const auto to = hn::Mul(hn::LoadU(narrow, angles.to + j), new_position);
    const auto from = hn::Mul(hn::LoadU(narrow, angles.from + j), position);
    hn::Vec<D> cosine, sine;
    CosSin(d, hn::Sub(hn::PromoteTo(d, to), hn::PromoteTo(d, from)), &cosine, &sine);
    hn::StoreU(hn::DemoteTo(narrow, cosine), narrow, angles.cosines + j);
    hn::StoreU(hn::DemoteTo(narrow, sine), narrow, angles.sines + j);
  }
  return j;
}

inline void FillRotaryAngles(const RotaryAngles& angles) {
  const int64_t done = FillAngles(hn::ScalableTag<double>(), angles, 0);
  FillAngles(hn::CappedTag<double, 1>(), angles, done);
}

// The nearest half, ties to even, in the lower 16 bits.
template <class D>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<D>> HalfBits(D d, hn::Vec<D> v) {
  const hn::RebindToUnsigned<D> du;
  const hn::RebindToSigned<D> di;
  const auto bits = hn::BitCast(du, v);
  const auto magnitude = hn::And(bits, hn::Set(du, 0x7FFFFFFFU));
  // The difference of the exponents' biases is 112.
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du, 1U));
  const auto normal = hn::ShiftRight<13>(
      hn::Sub(hn::Add(hn::Add(magnitude, hn::Set(du, 0xFFFU)), odd), hn::Set(du, 112U << 23)));
  // Added to 1/2, a number is rounded to multiples of 2^-24, the denormals' steps.
  const auto denormal =
      hn::Sub(hn::BitCast(du, hn::Add(hn::BitCast(d, magnitude), hn::Set(d, 0.5F))),
              hn::Set(du, 0x3F000000U));
  const auto compare = hn::BitCast(di, magnitude);
  const auto small = hn::RebindMask(du, hn::Lt(compare, hn::Set(di, 0x38800000)));
  const auto large = hn::RebindMask(du, hn::Gt(compare, hn::Set(di, 0x477FEFFF)));
  const auto nan = hn::RebindMask(du, hn::Gt(compare, hn::Set(di, 0x7F800000)));
  auto half = hn::IfThenElse(small, denormal, normal);
  half = hn::IfThenElse(large, hn::Set(du, 0x7C00U), half);
  half = hn::IfThenElse(nan, hn::Set(du, 0x7E00U), half);
  return hn::Or(half, hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 0x8000U)));
}

template <class D>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<D>> BfloatBits(D /*d*/, hn::Vec<D> v) {
  const hn::RebindToUnsigned<D> du;
  const auto bits = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1U));
  const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(du, 0x7FFFU)), odd));
  const auto quiet = hn::Or(hn::ShiftRight<16>(bits), hn::Set(du, 0x40U));
  return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), quiet, rounded);
}

// How elements of a type are loaded and stored: T as they lie in memory, one float32 lane each.
template <DType kType>
struct ElementOf {
  using T = uint16_t;
  template <class D>
  static HWY_INLINE hn::Vec<D> Promote(D d, hn::Vec<hn::Rebind<T, D>> raw) {
    if constexpr (kType == DType::kBF16) {
      return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(hn::RebindToUnsigned<D>(), raw)));
    } else {
#if HWY_TARGET <= HWY_AVX2 || HWY_TARGET == HWY_NEON
      return hn::PromoteTo(d, hn::BitCast(hn::Rebind<hwy::float16_t, D>(), raw));
#else
      const hn::Rebind<T, D> d16;
      HWY_ALIGN T lanes[hn::MaxLanes(d)];
      hn::Store(raw, d16, lanes);
      return PromoteHalf(d, reinterpret_cast<const std::byte*>(lanes));
#endif
    }
  }
  template <class D>
  static HWY_INLINE hn::Vec<hn::Rebind<T, D>> Demote(D d, hn::Vec<D> v) {
    const hn::Rebind<T, D> d16;
    const hn::RebindToSigned<D> di;
    if constexpr (kType == DType::kBF16) {
      return hn::DemoteTo(d16, hn::BitCast(di, BfloatBits(d, v)));
    } else {
#if HWY_TARGET <= HWY_AVX2 || HWY_TARGET == HWY_NEON
      return hn::BitCast(d16, hn::DemoteTo(hn::Rebind<hwy::float16_t, D>(), v));
#else
      // Highway's own emulation does not round.
      return hn::DemoteTo(d16, hn::BitCast(di, HalfBits(d, v)));
#endif
    }
  }
};

template <>
struct ElementOf<DType::kF32> {
  using T = float;
  template <class D>
  static HWY_INLINE hn::Vec<D> Promote(D /*d*/, hn::Vec<D> raw) {
    return raw;
  }
  template <class D>
  static HWY_INLINE hn::Vec<D> Demote(D /*d*/, hn::Vec<D> v) {
    return v;
  }
};

template <DType kType, RotaryPairing kPairing>
class RowRotator {
 public:
  using Element = ElementOf<kType>;
  using T = typename Element::T;

  // Rotates whole vectors of pairs from `begin` on; returns where it stopped. The second element of
  // a half-split pair lies `half` elements behind the first.
  template <class D>
  static HWY_INLINE int64_t Run(D d, const T* in, T* out, int64_t half, const float* cosines,
                                const float* sines, int64_t begin, int64_t end) {
    const hn::Rebind<T, D> dt;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    int64_t j = begin;
    for (; j + lanes <= end; j += lanes) {
      hn::Vec<decltype(dt)> first, second;
      if constexpr (kPairing == RotaryPairing::kInterleaved) {
        hn::LoadInterleaved2(dt, in + 2 * j, first, second);
      } else {
        first = hn::LoadU(dt, in + j);
        second = hn::LoadU(dt, in + half + j);
      }
      const auto x = Element::Promote(d, first);
      const auto y = Element::Promote(d, second);
      const auto c = hn::LoadU(d, cosines + j);
      const auto s = hn::LoadU(d, sines + j);
      first = Element::Demote(d, hn::NegMulAdd(y, s, hn::Mul(x, c)));
      second = Element::Demote(d, hn::MulAdd(x, s, hn::Mul(y, c)));
      if constexpr (kPairing == RotaryPairing::kInterleaved) {
        hn::StoreInterleaved2(first, second, dt, out + 2 * j);
      } else {
        hn::StoreU(first, dt, out + j);
        hn::StoreU(second, dt, out + half + j);
      }
    }
    return j;
  }
};

template <DType kType, RotaryPairing kPairing>
HWY_INLINE void RotateRowT(const RotateRow& row) {
  using Rotator = RowRotator<kType, kPairing>;
  using T = typename Rotator::T;
  const hn::ScalableTag<float> d;
  constexpr int64_t kLanes = hn::MaxLanes(d);
  const auto* in = reinterpret_cast<const T*>(row.source);
  auto* out = reinterpret_cast<T*>(row.destination);
  const int64_t done = Rotator::Run(d, in, out, row.pairs, row.cosines, row.sines, 0, row.pairs);
  if (done == row.pairs) return;
  // The rest goes through one vector that is padded.
  constexpr bool kInterleaved = kPairing == RotaryPairing::kInterleaved;
  const auto rest = static_cast<size_t>(row.pairs - done);
  T padded[2 * kLanes] = {};
  float cosines[kLanes] = {};
  float sines[kLanes] = {};
  // Where the second elements lie, or, interleaved, the second half of the elements.
  const size_t second = kInterleaved ? rest : static_cast<size_t>(kLanes);
  const int64_t from = kInterleaved ? 2 * done : done;
  const int64_t from_second = kInterleaved ? 2 * done + (row.pairs - done) : row.pairs + done;
  const auto* bytes = row.source;
  std::memcpy(padded, bytes + from * sizeof(T), rest * sizeof(T));
  std::memcpy(padded + second, bytes + from_second * sizeof(T), rest * sizeof(T));
  std::memcpy(cosines, row.cosines + done, rest * sizeof(float));
  std::memcpy(sines, row.sines + done, rest * sizeof(float));
  Rotator::Run(d, padded, padded, kLanes, cosines, sines, 0, static_cast<int64_t>(hn::Lanes(d)));
  std::memcpy(row.destination + from * sizeof(T), padded, rest * sizeof(T));
  std::memcpy(row.destination + from_second * sizeof(T), padded + second, rest * sizeof(T));
}

template <DType kType>
HWY_INLINE void RotateRowOf(const RotateRow& row) {
  if (row.pairing == RotaryPairing::kInterleaved) {
    RotateRowT<kType, RotaryPairing::kInterleaved>(row);
  } else {
    RotateRowT<kType, RotaryPairing::kHalfSplit>(row);
  }
}

inline void RotateRowTo(const RotateRow& row) {
  if (row.dtype == DType::kBF16) return RotateRowOf<DType::kBF16>(row);
  if (row.dtype == DType::kF16) return RotateRowOf<DType::kF16>(row);
  RotateRowOf<DType::kF32>(row);
}

}  // namespace structkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
