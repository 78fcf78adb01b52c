#include "kernels/cuda/device_block.h"
#include "kernels/cuda/gather.h"
#include "kernels/cuda/gather_steps.h"
#include "kernels/cuda/rotate_steps.h"

namespace structkv::cuda {
namespace {

// 80 KB of rows in flight, or 40 KB where they move; 23 KB fills an H200 (kernels/cuda/saliency.h).
constexpr int kBlocksOfMultiprocessor = 5;

__global__ void __launch_bounds__(kGatherThreads, kBlocksOfMultiprocessor)
    CopyKernel(const __grid_constant__ CopyLaunch launch) {
  __shared__ RowPlaces places;
  DeviceBlock block;
  CopyTile(block, launch, places);
}

__global__ void __launch_bounds__(kGatherThreads, kBlocksOfMultiprocessor)
    RotateKernel(const __grid_constant__ RotateLaunch launch) {
  __shared__ RotateShared shared;
  DeviceBlock block;
  RotateTile(block, launch, shared);
}

// Launches of as many of the jobs at a time as a kernel's parameters have room for.
template <class Launch, class Params>
cudaError_t LaunchJobs(void (*kernel)(Launch), const Params& params, cudaStream_t stream) {
  if (params.job_count < 0 || (params.job_count > 0 && params.jobs == nullptr)) {
    return cudaErrorInvalidValue;
  }
  for (int64_t i = 0; i < params.job_count; ++i) {
    if (!IsValid(params.jobs[i])) return cudaErrorInvalidValue;
    if (KeepsAny(params.jobs[i]) && TilesOf(PlanOf(params.jobs[i])) > kMaxTiles) {
      return cudaErrorNotSupported;
    }
  }
  for (int64_t i = 0; i < params.job_count;) {
    Launch launch;
    i += FillLaunch(params.jobs + i, params.job_count - i, &launch);
    if (launch.tiles == 0) continue;
    kernel<<<static_cast<unsigned>(launch.tiles), kGatherThreads, 0, stream>>>(launch);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t LaunchGather(const GatherParams& params, cudaStream_t stream) noexcept {
  return LaunchJobs(&CopyKernel, params, stream);
}

cudaError_t LaunchGatherRotated(const GatherRotatedParams& params, cudaStream_t stream) noexcept {
  return LaunchJobs(&RotateKernel, params, stream);
}

}  // namespace structkv::cuda
