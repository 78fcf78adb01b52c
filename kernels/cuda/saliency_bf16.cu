#include "kernels/cuda/saliency_scores.cuh"

namespace structkv::cuda {

cudaError_t LaunchScoresBF16(const SaliencyPlan& plan, bool store, const TileLaunch& launch) {
  return LaunchScoresOf16<DType::kBF16>(plan, store, launch);
}

}  // namespace structkv::cuda
