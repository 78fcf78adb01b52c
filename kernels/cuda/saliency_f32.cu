#include "kernels/cuda/saliency_scores.cuh"

namespace structkv::cuda {

cudaError_t LaunchScoresF32(const SaliencyPlan& plan, bool store, const TileLaunch& launch) {
  return LaunchScoresOf<Pieces<DType::kF32, DType::kF32>, 0>(plan, store, launch);
}

}  // namespace structkv::cuda
