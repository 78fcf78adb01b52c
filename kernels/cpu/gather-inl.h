// Copies scattered rows. Compiled once per instruction set.
#include <cstring>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/cpu/kernel_table.h"

#if defined(STRUCTKV_KERNELS_CPU_GATHER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef STRUCTKV_KERNELS_CPU_GATHER_INL_H_
#undef STRUCTKV_KERNELS_CPU_GATHER_INL_H_
#else
#define STRUCTKV_KERNELS_CPU_GATHER_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace structkv::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

inline void CopyRowsTo(const CopyRows& copy) {
  const hn::ScalableTag<uint8_t> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  // About as many lines in flight as the core can track.
  const int64_t distance = HWY_MAX(int64_t{1}, int64_t{4096} / copy.row_bytes);
  for (int64_t i = 0; i < copy.rows; ++i) {
    if (i + distance < copy.rows) {
      const std::byte* ahead =
          copy.source + copy.positions[i + distance] * copy.source_stride_bytes;
      for (int64_t line = 0; line < copy.row_bytes; line += 64) hwy::Prefetch(ahead + line);
    }
    const auto* from = reinterpret_cast<const uint8_t*>(copy.source + copy.positions[i] *
                                                                          copy.source_stride_bytes);
    auto* to = reinterpret_cast<uint8_t*>(copy.destination + i * copy.destination_stride_bytes);
    int64_t b = 0;
    for (; b + lanes <= copy.row_bytes; b += lanes) hn::StoreU(hn::LoadU(d, from + b), d, to + b);
    if (b < copy.row_bytes) std::memcpy(to + b, from + b, static_cast<size_t>(copy.row_bytes - b));
  }
}

}  // namespace structkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
