// The keys that selection orders scores by, and their digits. Runs on the device and on the host.
#pragma once

#include <cstdint>

#include "kernels/cuda/host_device.h"
#include "kernels/cuda/numbers.h"

namespace structkv::cuda {

// A key's digits, the highest first: 11, 11 and 10 bits.
inline constexpr int kDigits = 3;
inline constexpr int kBins = 2048;
// Bins are also counted in groups, so that two steps of one warp find any of them.
inline constexpr int kGroupBins = 32;
inline constexpr int kGroups = kBins / kGroupBins;

STRUCTKV_HOST_DEVICE constexpr int DigitShift(int digit) {
  return digit == 0 ? 21 : digit == 1 ? 10 : 0;
}
STRUCTKV_HOST_DEVICE constexpr int DigitBins(int digit) { return digit == 2 ? 1024 : kBins; }
STRUCTKV_HOST_DEVICE constexpr uint32_t DigitOf(uint32_t key, int digit) {
  return (key >> DigitShift(digit)) & static_cast<uint32_t>(DigitBins(digit) - 1);
}

// Whether a key's digits before `digit` are those of `prefix`.
STRUCTKV_HOST_DEVICE constexpr bool HasPrefix(uint32_t key, uint32_t prefix, int digit) {
  const uint32_t mask = digit == 0 ? 0 : ~0U << DigitShift(digit - 1);
  return ((key ^ prefix) & mask) == 0;
}

// Unsigned keys in the order of the values; both zeros have one key, as they compare equal.
STRUCTKV_HOST_DEVICE inline uint32_t OrderedKey(float value) {
  const uint32_t bits = FloatBits(value + 0.0F);  // the sum of -0 and 0 is 0
  const auto signs = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
  return bits ^ (signs | 0x80000000U);
}

// The value of a key.
STRUCTKV_HOST_DEVICE inline float KeyValue(uint32_t key) {
  return FloatOf((key & 0x80000000U) != 0 ? key & 0x7FFFFFFFU : ~key);
}

// Where the best of a row end: all keys above `threshold`, and the first `ties` of those equal to
// it. While the digits are being found the threshold has those that are.
struct Cut {
  uint32_t threshold = 0;
  uint32_t ties = 0;
};

// Where there is no token: below the keys of all finite values, and so is its first digit.
inline constexpr uint32_t kNoKey = 0;

// The cut of nothing: no finite value has this key, nor its first digit.
STRUCTKV_HOST_DEVICE constexpr Cut CutOfNothing() { return {0xFFFFFFFFU, 0}; }

// Tokens before one that are kept: those above the cut, and of those equal to it the first.
STRUCTKV_HOST_DEVICE constexpr uint32_t KeptBefore(uint32_t above, uint32_t equal, uint32_t ties) {
  return above + (equal < ties ? equal : ties);
}

// What is counted and summed at a time, by one warp. Sums are combined in the order of the tiles,
// so that they do not depend on how many blocks a row is spread over.
inline constexpr int kTileTokens = 512;
STRUCTKV_HOST_DEVICE constexpr int64_t Tiles(int64_t tokens) {
  return (tokens + kTileTokens - 1) / kTileTokens;
}

}  // namespace structkv::cuda
