// Radix selection over order-preserving keys. Compiled once per instruction set.
#include <algorithm>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/cpu/kernel_table.h"

#if defined(STRUCTKV_KERNELS_CPU_SELECT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef STRUCTKV_KERNELS_CPU_SELECT_INL_H_
#undef STRUCTKV_KERNELS_CPU_SELECT_INL_H_
#else
#define STRUCTKV_KERNELS_CPU_SELECT_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace structkv::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Unsigned keys in the order of the values; -0.0 becomes +0.0.
template <class D, class V = hn::Vec<D>>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<D>> OrderedKeys(D d, V value) {
  const hn::RebindToUnsigned<D> du;
  const hn::RebindToSigned<D> di;
  const auto bits = hn::BitCast(di, hn::Add(value, hn::Zero(d)));
  const auto negative = hn::BitCast(du, hn::ShiftRight<31>(bits));  // all ones or zero
  return hn::Xor(hn::BitCast(du, bits), hn::Or(negative, hn::Set(du, 0x80000000U)));
}

inline float KeyToValue(uint32_t key) {
  const uint32_t bits = key & 0x80000000U ? key ^ 0x80000000U : ~key;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Counts digit (key >> shift) & (kBins - 1) of the keys whose higher bits are those of `prefix`.
inline constexpr int kBins = 2048;
inline void Histogram(const float* scores, int64_t tokens, uint32_t prefix, uint32_t prefix_mask,
                      int shift, uint32_t* counts) {
  const hn::ScalableTag<float> d;
  const hn::RebindToUnsigned<decltype(d)> du;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  constexpr int64_t kChunk = 512;
  // Two tables: a run of equal digits does not wait for itself.
  uint32_t second[kBins] = {};
  HWY_ALIGN uint32_t keys[kChunk + hn::MaxLanes(d)];
  std::fill(counts, counts + kBins, 0);
  const auto want = hn::Set(du, prefix);
  const auto mask = hn::Set(du, prefix_mask);
  for (int64_t begin = 0; begin < tokens; begin += kChunk) {
    const int64_t end = HWY_MIN(tokens, begin + kChunk);
    int64_t found = 0;
    int64_t j = begin;
    if (prefix_mask == 0) {
      for (; j + lanes <= end; j += lanes, found += lanes) {
        hn::StoreU(OrderedKeys(d, hn::LoadU(d, scores + j)), du, keys + found);
      }
    } else {
      for (; j + lanes <= end; j += lanes) {
        const auto key = OrderedKeys(d, hn::LoadU(d, scores + j));
        const auto match = hn::Eq(hn::And(key, mask), want);
        if (hn::AllFalse(du, match)) continue;
        found += static_cast<int64_t>(hn::CompressStore(key, match, du, keys + found));
      }
    }
    for (; j < end; ++j) {
      const hn::CappedTag<float, 1> d1;
      const uint32_t key = hn::GetLane(OrderedKeys(d1, hn::Set(d1, scores[j])));
      if ((key & prefix_mask) == prefix) keys[found++] = key;
    }
    int64_t i = 0;
    for (; i + 2 <= found; i += 2) {
      ++counts[(keys[i] >> shift) & (kBins - 1)];
      ++second[(keys[i + 1] >> shift) & (kBins - 1)];
    }
    if (i < found) ++counts[(keys[i] >> shift) & (kBins - 1)];
  }
  for (int b = 0; b < kBins; ++b) counts[b] += second[b];
}

inline TopCut FindCut(const float* scores, int64_t tokens, int64_t top) {
  if (top <= 0) return {0xFFFFFFFFU, 0, 0};  // no finite value has this key
  uint32_t counts[kBins];
  uint32_t prefix = 0;
  uint32_t mask = 0;
  int64_t above = 0;
  for (const int shift : {21, 10, 0}) {
    const int bins = shift == 0 ? 1024 : kBins;
    // The last digit has 10 bits: its eleventh belongs to the prefix and is the same for all.
    Histogram(scores, tokens, prefix, mask, shift, counts);
    if (shift == 0) {
      for (int b = 0; b < 1024; ++b) counts[b] += counts[b + 1024];
    }
    int bin = bins - 1;
    while (above + counts[bin] < top) above += counts[bin--];
    prefix |= static_cast<uint32_t>(bin) << shift;
    mask |= static_cast<uint32_t>(bins - 1) << shift;
  }
  return {prefix, above, top - above};
}

inline double SumAbove(const float* scores, int64_t tokens, uint32_t threshold) {
  const hn::ScalableTag<double> d;
  const hn::Rebind<float, decltype(d)> narrow;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const float limit = KeyToValue(threshold);
  const auto cut = hn::Set(d, static_cast<double>(limit));
  auto total = hn::Zero(d);
  int64_t j = 0;
  for (; j + lanes <= tokens; j += lanes) {
    const auto s = hn::PromoteTo(d, hn::LoadU(narrow, scores + j));
    total = hn::Add(total, hn::IfThenElseZero(hn::Gt(s, cut), s));
  }
  double sum = hn::GetLane(hn::SumOfLanes(d, total));
  for (; j < tokens; ++j) {
    if (scores[j] > limit) sum += static_cast<double>(scores[j]);
  }
  return sum;
}

inline void Collect(const float* scores, int64_t tokens, const TopCut& cut, int32_t* positions) {
  const hn::ScalableTag<float> d;
  const hn::RebindToSigned<decltype(d)> di;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const float limit = KeyToValue(cut.threshold);
  const auto threshold = hn::Set(d, limit);
  const int64_t wanted = cut.above + cut.ties;
  int64_t ties = cut.ties;
  int64_t found = 0;
  int64_t j = 0;
  auto index = hn::Iota(di, 0);
  const auto step = hn::Set(di, static_cast<int32_t>(lanes));
  for (; j + lanes <= tokens && found < wanted; j += lanes, index = hn::Add(index, step)) {
    const auto s = hn::LoadU(d, scores + j);
    // Once the ties are used up, or where there are none here, equal ones are simply out.
    auto in = ties > 0 ? hn::Not(hn::Lt(s, threshold)) : hn::Gt(s, threshold);
    if (hn::AllFalse(d, in)) continue;
    if (ties > 0) {
      const int64_t equal = static_cast<int64_t>(hn::CountTrue(d, hn::Eq(s, threshold)));
      if (equal > ties) break;  // the scalar loop takes the first ones
      ties -= equal;
    }
    const auto in_int = hn::RebindMask(di, in);
    if (found + lanes <= wanted) {
      hn::StoreU(hn::Compress(index, in_int), di, positions + found);
      found += static_cast<int64_t>(hn::CountTrue(d, in));
    } else {
      found += static_cast<int64_t>(hn::CompressBlendedStore(index, in_int, di, positions + found));
    }
  }
  for (; j < tokens && found < wanted; ++j) {
    if (scores[j] > limit || (scores[j] == limit && ties-- > 0)) {
      positions[found++] = static_cast<int32_t>(j);
    }
  }
}

}  // namespace structkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
