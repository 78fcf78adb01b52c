#include "kernels/streaming_copy.h"

#include <cstdint>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/streaming_copy.cc"
#include "hwy/foreach_target.h"  // includes this file once for each instruction set
// Below it.
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace structkv::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Four vectors at a time, so that whole cache lines leave for memory. `to` is aligned for vectors,
// `size` a multiple of 256. Stores of 16 bytes were slower than memcpy, by half on a Zen 4.
void CopyPastCaches(uint8_t* to, const uint8_t* from, size_t size) {
  const hn::CappedTag<uint8_t, 64> d;
  const size_t lanes = hn::Lanes(d);
  if (lanes < 32) {
    std::memcpy(to, from, size);
    return;
  }
  for (size_t i = 0; i < size; i += 4 * lanes) {
    const auto first = hn::LoadU(d, from + i);
    const auto second = hn::LoadU(d, from + i + lanes);
    const auto third = hn::LoadU(d, from + i + 2 * lanes);
    const auto fourth = hn::LoadU(d, from + i + 3 * lanes);
    hn::Stream(first, d, to + i);
    hn::Stream(second, d, to + i + lanes);
    hn::Stream(third, d, to + i + 2 * lanes);
    hn::Stream(fourth, d, to + i + 3 * lanes);
  }
}

}  // namespace structkv::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace structkv {
namespace {

HWY_EXPORT(CopyPastCaches);

constexpr size_t kLineBytes = 64;
// What CopyPastCaches takes at a time with the widest vectors.
constexpr size_t kStepBytes = 256;
// Shorter runs are dominated by their ends.
constexpr size_t kShortestBytes = 2048;

}  // namespace

void StreamingCopy(std::byte* to, const std::byte* from, size_t size) {
  if (size < kShortestBytes) {
    std::memcpy(to, from, size);
    return;
  }
  const size_t head = -reinterpret_cast<uintptr_t>(to) % kLineBytes;
  const size_t body = (size - head) / kStepBytes * kStepBytes;
  std::memcpy(to, from, head);
  HWY_DYNAMIC_DISPATCH(CopyPastCaches)
  (reinterpret_cast<uint8_t*>(to + head), reinterpret_cast<const uint8_t*>(from + head), body);
  std::memcpy(to + head + body, from + head + body, size - head - body);
}

void FinishStreamingCopies() { hwy::FlushStream(); }

}  // namespace structkv
#endif  // HWY_ONCE
