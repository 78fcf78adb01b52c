// Operations on vectors over tokens. Compiled once per instruction set.
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/cpu/kernel_table.h"

#if defined(STRUCTKV_KERNELS_CPU_VECTOR_OPS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef STRUCTKV_KERNELS_CPU_VECTOR_OPS_INL_H_
#undef STRUCTKV_KERNELS_CPU_VECTOR_OPS_INL_H_
#else
#define STRUCTKV_KERNELS_CPU_VECTOR_OPS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace structkv::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Calls vector(d, j) for whole vectors and then for single elements, so that a result does not
// depend on where its element lies.
template <class Body>
HWY_INLINE void ForEachVector(int64_t tokens, const Body& body) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t j = 0;
  for (; j + lanes <= tokens; j += lanes) body(d, j);
  for (; j < tokens; ++j) body(hn::CappedTag<float, 1>(), j);
}

inline void SumHeads(const float* in, int64_t heads, int64_t stride, int64_t tokens, float* out) {
  ForEachVector(tokens, [=](auto d, int64_t j) HWY_ATTR {
    auto sum = hn::LoadU(d, in + j);
    for (int64_t h = 1; h < heads; ++h) sum = hn::Add(sum, hn::LoadU(d, in + h * stride + j));
    hn::StoreU(sum, d, out + j);
  });
}

inline void Accumulate(float decay, const float* in, float* inout, int64_t tokens) {
  ForEachVector(tokens, [=](auto d, int64_t j) HWY_ATTR {
    const auto sum = hn::MulAdd(hn::Set(d, decay), hn::LoadU(d, inout + j), hn::LoadU(d, in + j));
    hn::StoreU(sum, d, inout + j);
  });
}

inline void Slide(const float* in, int64_t tokens, int64_t kernel, bool maximum, float factor,
                  float* out) {
  ForEachVector(tokens, [=](auto d, int64_t j) HWY_ATTR {
    auto value = hn::LoadU(d, in + j);
    if (maximum) {
      for (int64_t o = 1; o < kernel; ++o) value = hn::Max(value, hn::LoadU(d, in + j + o));
    } else {
      for (int64_t o = 1; o < kernel; ++o) value = hn::Add(value, hn::LoadU(d, in + j + o));
    }
    hn::StoreU(hn::Mul(value, hn::Set(d, factor)), d, out + j);
  });
}

inline int64_t FindBad(const float* values, int64_t tokens) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto top = hn::Set(d, hwy::HighestValue<float>());
  int64_t j = 0;
  for (; j + lanes <= tokens; j += lanes) {
    const auto v = hn::LoadU(d, values + j);
    if (!hn::AllTrue(d, hn::And(hn::Ge(v, hn::Zero(d)), hn::Le(v, top)))) break;
  }
  for (; j < tokens; ++j) {
    if (!(values[j] >= 0 && values[j] <= hwy::HighestValue<float>())) return j;
  }
  return -1;
}

inline SumsBlock Sums(const float* scores, int64_t tokens) {
  const hn::ScalableTag<double> d;
  const hn::Rebind<float, decltype(d)> narrow;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  auto total = hn::Zero(d);
  auto logs = hn::Zero(d);
  auto squares = hn::Zero(d);
  const auto add = [&](auto s) HWY_ATTR {
    const auto positive = hn::Gt(s, hn::Zero(d));
    const auto safe = hn::IfThenElse(positive, s, hn::Set(d, 1.0));
    total = hn::Add(total, s);
    logs = hn::MulAdd(s, hn::Log(d, safe), logs);
    squares = hn::MulAdd(s, s, squares);
  };
  int64_t j = 0;
  for (; j + lanes <= tokens; j += lanes) {
    add(hn::PromoteTo(d, hn::LoadU(narrow, scores + j)));
  }
  if (j < tokens) {
    HWY_ALIGN float rest[hn::MaxLanes(d)] = {};
    for (int64_t k = 0; j + k < tokens; ++k) rest[k] = scores[j + k];
    add(hn::PromoteTo(d, hn::LoadU(narrow, rest)));
  }
  return {hn::GetLane(hn::SumOfLanes(d, total)), hn::GetLane(hn::SumOfLanes(d, logs)),
          hn::GetLane(hn::SumOfLanes(d, squares))};
}

}  // namespace structkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
