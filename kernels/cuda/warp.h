// What the lanes of a warp find out together.
#pragma once

#include <cstdint>

#include "kernels/cuda/host_device.h"

namespace structkv::cuda {

STRUCTKV_HOST_DEVICE inline uint32_t CountLanes(uint32_t lanes) {
#ifdef __CUDA_ARCH__
  return static_cast<uint32_t>(__popc(lanes));
#else
  return static_cast<uint32_t>(__builtin_popcount(lanes));
#endif
}

// Of at least one.
STRUCTKV_HOST_DEVICE inline int LowestLane(uint32_t lanes) {
#ifdef __CUDA_ARCH__
  return __ffs(static_cast<int>(lanes)) - 1;
#else
  return __builtin_ctz(lanes);
#endif
}

// The sum of the values of the lanes up to each one.
template <class Block>
STRUCTKV_DEVICE uint32_t SumUpTo(Block& block, uint32_t value) {
  for (int step = 1; step < Block::kLanes; step *= 2) {
    const uint32_t lower = block.Shuffle(value, block.lane() - step);
    if (block.lane() >= step) value += lower;
  }
  return value;
}

// The lanes' values, combined as a tree; every lane gets the sum.
template <class Block>
STRUCTKV_DEVICE double SumLanes(Block& block, double value) {
  for (int step = Block::kLanes / 2; step > 0; step /= 2) value += block.ShuffleXor(value, step);
  return value;
}

}  // namespace structkv::cuda
