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

// Bytes of rows that are asked for ahead of the copy: into the second-level cache, which can wait
// for far more lines at a time than the first, and from there into the first.
inline constexpr int64_t kFarBytes = 16384;
inline constexpr int64_t kNearBytes = 3072;
// A larger block holds every position.
inline constexpr int64_t kMostBlockTokens = int64_t{1} << 31;

// A row is kBytes long, or where that is 0 `bytes`: known lengths leave no loops behind.
template <bool kStream, bool kPaged, int64_t kBytes>
class RowCopier {
 public:
  explicit RowCopier(const CopyRows& copy)
      : copy_(copy),
        bytes_(kBytes != 0 ? kBytes : copy.row_bytes),
        block_tokens_(static_cast<uint32_t>(HWY_MIN(copy.source_block_tokens, kMostBlockTokens))),
        shift_((block_tokens_ & (block_tokens_ - 1)) == 0 ? __builtin_ctz(block_tokens_ | 1U << 31)
                                                          : -1) {}

  void Run() const {
    const int64_t far = HWY_MAX(int64_t{2}, kFarBytes / (bytes_ * copy_.heads));
    const int64_t near = HWY_MAX(int64_t{1}, kNearBytes / (bytes_ * copy_.heads));
    // A dense destination is a block without an end.
    const int64_t block = copy_.destination_block_tokens;
    int64_t left = block != 0 ? block - copy_.destination_place : copy_.rows + 1;
    std::byte* to = copy_.destination;
    for (int64_t i = 0; i < copy_.rows; ++i) {
      for (int64_t h = 0; h < copy_.heads; ++h) {
        if (i + far < copy_.rows) Prefetch<2>(Source(h, i + far));
        if (i + near < copy_.rows) Prefetch<3>(Source(h, i + near));
        Copy(Source(h, i), to + h * copy_.destination_head_stride_bytes);
      }
      to += copy_.destination_stride_bytes;
      if (--left == 0) {
        to += copy_.destination_block_stride_bytes - block * copy_.destination_stride_bytes;
        left = block;
      }
    }
  }

 private:
  HWY_INLINE const std::byte* Source(int64_t head, int64_t row) const {
    const int32_t position = copy_.positions[head * copy_.position_stride + row];
    const std::byte* source = copy_.source + head * copy_.source_head_stride_bytes;
    if constexpr (!kPaged) return source + position * copy_.source_stride_bytes;
    const auto token = static_cast<uint32_t>(position);
    const uint32_t block = shift_ >= 0 ? token >> shift_ : token / block_tokens_;
    const int64_t place = token - block * block_tokens_;
    const int64_t from = copy_.block_table != nullptr ? copy_.block_table[block] : int64_t{block};
    return source + from * copy_.source_block_stride_bytes + place * copy_.source_stride_bytes;
  }

  // 3: into all levels, 2: into the second and those behind it.
  template <int kLevel>
  HWY_INLINE void Prefetch(const std::byte* row) const {
#pragma GCC unroll 8
    for (int64_t b = 0; b < bytes_; b += 64) __builtin_prefetch(row + b, 0, kLevel);
  }

  HWY_INLINE void Copy(const std::byte* source, std::byte* destination) const {
    const hn::ScalableTag<uint8_t> d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    const auto* from = reinterpret_cast<const uint8_t*>(source);
    auto* to = reinterpret_cast<uint8_t*>(destination);
    int64_t b = 0;
#pragma GCC unroll 8
    for (; b + lanes <= bytes_; b += lanes) {
      const auto v = hn::LoadU(d, from + b);
      if constexpr (kStream) {
        hn::Stream(v, d, to + b);
      } else {
        hn::StoreU(v, d, to + b);
      }
    }
    if (b < bytes_) std::memcpy(to + b, from + b, static_cast<size_t>(bytes_ - b));
  }

  const CopyRows copy_;
  const int64_t bytes_;
  const uint32_t block_tokens_;
  const int shift_;  // of a power of two, else -1
};

template <bool kStream, bool kPaged>
HWY_INLINE void CopyRowsP(const CopyRows& copy) {
  if (copy.row_bytes == 256) return RowCopier<kStream, kPaged, 256>(copy).Run();
  if (copy.row_bytes == 128) return RowCopier<kStream, kPaged, 128>(copy).Run();
  RowCopier<kStream, kPaged, 0>(copy).Run();
}

template <bool kStream>
HWY_INLINE void CopyRowsT(const CopyRows& copy) {
  if (copy.source_block_tokens != 0) return CopyRowsP<kStream, true>(copy);
  CopyRowsP<kStream, false>(copy);
}

inline void CopyRowsTo(const CopyRows& copy) {
  const auto alignment = static_cast<int64_t>(hn::Lanes(hn::ScalableTag<uint8_t>()));
  const int64_t offsets = static_cast<int64_t>(reinterpret_cast<uintptr_t>(copy.destination)) |
                          copy.destination_stride_bytes | copy.destination_head_stride_bytes |
                          copy.destination_block_stride_bytes | copy.row_bytes;
  if (copy.stream && offsets % alignment == 0) {
    CopyRowsT<true>(copy);
    hwy::FlushStream();
  } else {
    CopyRowsT<false>(copy);
  }
}

}  // namespace structkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
