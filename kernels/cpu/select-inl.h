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

// Row b lists the places of the bits that are set in b, lowest first.
struct BitPlaces {
  constexpr BitPlaces() {
    for (int b = 0; b < 256; ++b) {
      int found = 0;
      for (int k = 0; k < 8; ++k) {
        if ((b >> k & 1) != 0) rows[b][found++] = static_cast<uint8_t>(k);
      }
    }
  }
  uint8_t rows[256][8] = {};
};
inline constexpr BitPlaces kBitPlaces;

// Of 4 and 8 lanes the places come from the table: there Highway's own Compress copies its table to
// the stack at each call.
inline constexpr bool kPlacesFromTable =
    hn::MaxLanes(hn::ScalableTag<float>()) == 4 || hn::MaxLanes(hn::ScalableTag<float>()) == 8;

template <class D, class M = hn::Mask<D>>
HWY_INLINE const uint8_t* PlacesOf(D d, M mask) {
  uint8_t bits[8];
  hn::StoreMaskBits(d, mask, bits);
  return kBitPlaces.rows[bits[0]];
}

// Writes the positions base, base + 1 .. of the lanes in `mask`, and past them up to a whole
// vector.
template <class D, class M = hn::Mask<D>>
HWY_INLINE void StorePositions(D d, M mask, int64_t base, int32_t* to) {
  const hn::RebindToSigned<D> di;
  const auto first = hn::Set(di, static_cast<int32_t>(base));
  if constexpr (kPlacesFromTable) {
    const hn::Rebind<uint8_t, D> d8;
    const auto places = hn::PromoteTo(di, hn::LoadU(d8, PlacesOf(d, mask)));
    hn::StoreU(hn::Add(first, places), di, to);
  } else {
    const auto all = hn::Add(first, hn::Iota(di, 0));
    hn::StoreU(hn::Compress(all, hn::RebindMask(di, mask)), di, to);
  }
}

// Writes the keys in `mask`, and past them up to a whole vector. Returns how many.
template <class D, class V = hn::Vec<D>, class M = hn::Mask<D>>
HWY_INLINE int64_t StoreKeys(D d, V keys, M mask, uint32_t* to) {
  const auto count = static_cast<int64_t>(hn::CountTrue(d, mask));
  if constexpr (kPlacesFromTable) {
    HWY_ALIGN uint32_t all[hn::MaxLanes(D())];
    hn::Store(keys, d, all);
    const uint8_t* places = PlacesOf(d, mask);
    for (int64_t k = 0; k < count; ++k) to[k] = all[places[k]];
  } else {
    hn::StoreU(hn::Compress(keys, mask), d, to);
  }
  return count;
}

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
        found += StoreKeys(du, key, match, keys + found);
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
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const float limit = KeyToValue(cut.threshold);
  const auto threshold = hn::Set(d, limit);
  const int64_t wanted = cut.above + cut.ties;
  int64_t ties = cut.ties;
  int64_t found = 0;
  int64_t j = 0;
  // A whole vector is written at a time: the last ones, past which it could run, are left to the
  // scalar loop.
  for (; j + lanes <= tokens && found + lanes <= wanted; j += lanes) {
    const auto s = hn::LoadU(d, scores + j);
    // Once the ties are used up equal ones are simply out.
    const auto in = ties > 0 ? hn::Not(hn::Lt(s, threshold)) : hn::Gt(s, threshold);
    if (ties > 0) {
      const int64_t equal = static_cast<int64_t>(hn::CountTrue(d, hn::Eq(s, threshold)));
      if (equal > ties) break;  // the scalar loop takes the first ones
      ties -= equal;
    }
    StorePositions(d, in, j, positions + found);
    found += static_cast<int64_t>(hn::CountTrue(d, in));
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
