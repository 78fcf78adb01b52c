#include "kernels/cuda/saliency_scores.cuh"

namespace structkv::cuda {

cudaError_t LaunchScoresF16(const SaliencyPlan& plan, bool store, const TileLaunch& launch) {
  return LaunchScoresOf16<DType::kF16>(plan, store, launch);
}

}  // namespace structkv::cuda
