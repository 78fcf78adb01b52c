// The template behind the functions of saliency_scores.h.
#pragma once

#include "kernels/cuda/saliency_scores.h"
#include "kernels/cuda/saliency_steps.h"
#include "kernels/cuda/tensor_block.h"

namespace structkv::cuda {

// Two blocks to a multiprocessor: at most 128 registers, which the build holds the compiler to. One
// under float32 queries, whose many multiplications are what takes the time.
template <class P, int kPairs, Scored kScored>
__global__ void __launch_bounds__(kSaliencyThreads, P::kQueryParts == 1 ? 2 : 1)
    ScoresKernel(const __grid_constant__ SaliencyPlan plan) {
  extern __shared__ float shared[];
  TensorBlock block;
  Scores<P, kPairs, kScored>(block, plan, shared);
}

// What a launch may have of shared memory without being allowed more.
inline constexpr int kSharedBytes = 48 << 10;
static_assert(kMaxKvHeads >= kSaliencyThreads / kLanes &&
              kMaxKvHeads * kUnitTokens * sizeof(float) <= kSharedBytes);

template <class Kernel>
cudaError_t LaunchTiles(Kernel* kernel, const SaliencyPlan& plan, const TileLaunch& launch) {
  kernel<<<launch.blocks, kSaliencyThreads, launch.shared_bytes, launch.stream>>>(plan);
  return cudaGetLastError();
}

// Storing has no registers to spare for a head size that is known: it takes any. So does the
// largest, which is rare.
template <class P, int kPairs>
cudaError_t LaunchScoresOf(const SaliencyPlan& plan, bool store, const TileLaunch& launch) {
  if (store) return LaunchTiles(&ScoresKernel<P, 0, Scored::kExps>, plan, launch);
  if (plan.window_max) return LaunchTiles(&ScoresKernel<P, 0, Scored::kMax>, plan, launch);
  return LaunchTiles(&ScoresKernel<P, kPairs, Scored::kSum>, plan, launch);
}

// Keys of 16 bits under queries of their type.
template <DType kType>
cudaError_t LaunchScoresOf16(const SaliencyPlan& plan, bool store, const TileLaunch& launch) {
  using P = Pieces<kType, kType>;
  if (plan.dim == 2 * kPairDims) return LaunchScoresOf<P, 2>(plan, store, launch);
  if (plan.dim == 4 * kPairDims) return LaunchScoresOf<P, 4>(plan, store, launch);
  return LaunchScoresOf<P, 0>(plan, store, launch);
}

}  // namespace structkv::cuda
