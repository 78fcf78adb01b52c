// 2^x for softmax. Per-target include guard: compiled once per instruction set.
#include "hwy/highway.h"

#if defined(STRUCTKV_KERNELS_CPU_EXP2_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef STRUCTKV_KERNELS_CPU_EXP2_INL_H_
#undef STRUCTKV_KERNELS_CPU_EXP2_INL_H_
#else
#define STRUCTKV_KERNELS_CPU_EXP2_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace structkv::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// 2^x to 3 * 2^-24 relative. 0 below -126 (and for -Inf), Inf from 128 on; NaN gives anything.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp2(D d, V x) {
  const hn::RebindToUnsigned<D> du;
  // Adding 1.5 * 2^23 rounds to an integer, which is left in the low bits.
  const V magic = hn::Set(d, 12582912.0F);
  const V clamped = hn::Min(x, hn::Set(d, 128.0F));
  const V shifted = hn::Add(clamped, magic);
  const V f = hn::Sub(clamped, hn::Sub(shifted, magic));
  // Minimax in relative error on [-0.5, 0.5] with p(0) = 1.
  V p = hn::Set(d, 0.001326472731307149F);
  p = hn::MulAdd(p, f, hn::Set(d, 0.009671512991189957F));
  p = hn::MulAdd(p, f, hn::Set(d, 0.05550733581185341F));
  p = hn::MulAdd(p, f, hn::Set(d, 0.24022242426872253F));
  p = hn::MulAdd(p, f, hn::Set(d, 0.6931470036506653F));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0F));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(du, shifted));
  const V y = hn::BitCast(d, hn::Add(hn::BitCast(du, p), exponent));
  return hn::IfThenElseZero(hn::Ge(x, hn::Set(d, -126.0F)), y);
}

}  // namespace structkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
