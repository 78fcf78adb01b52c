#include "kernels/cuda/saliency_scores.cuh"

namespace structkv::cuda {

cudaError_t LaunchScoresBF16(const SaliencyPlan& plan, bool store, const TileLaunch& launch) {
  using P = Pieces<DType::kBF16, DType::kBF16>;
  if (plan.dim == 2 * kPairDims) return LaunchScoresOf<P, 2>(plan, store, launch);
  if (plan.dim == 4 * kPairDims) return LaunchScoresOf<P, 4>(plan, store, launch);
  return LaunchScoresOf<P, 0>(plan, store, launch);
}

}  // namespace structkv::cuda
