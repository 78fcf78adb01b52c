#include "kernels/cuda/saliency_scores.cuh"

namespace structkv::cuda {

cudaError_t LaunchScoresE4M3(const SaliencyPlan& plan, DType query_type, bool store,
                             const TileLaunch& launch) {
  switch (query_type) {
    case DType::kF16:
      return LaunchScoresOf<Pieces<DType::kF8E4M3, DType::kF16>, 0>(plan, store, launch);
    case DType::kBF16:
      return LaunchScoresOf<Pieces<DType::kF8E4M3, DType::kBF16>, 0>(plan, store, launch);
    case DType::kF32:
      return LaunchScoresOf<Pieces<DType::kF8E4M3, DType::kF32>, 0>(plan, store, launch);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace structkv::cuda
