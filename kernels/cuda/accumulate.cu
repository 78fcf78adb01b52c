#include <algorithm>

#include "kernels/cuda/accumulate.h"

namespace structkv::cuda {
namespace {

constexpr int kThreads = 256;
// Enough for every multiprocessor of any GPU; each thread goes on with the tokens after.
constexpr int64_t kMaxBlocks = 4096;

__global__ void __launch_bounds__(kThreads) Accumulate(AccumulateParams params) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; j < params.tokens;
       j += step) {
    float sum = 0.0F;
    for (int64_t h = 0; h < params.heads; ++h) {
      sum = __fadd_rn(sum, params.per_head[h * params.tokens + j]);
    }
    if (params.saliency != nullptr) params.saliency[j] = sum;
    if (params.centrality != nullptr) {
      params.centrality[j] = __fadd_rn(__fmul_rn(params.decay, params.centrality[j]), sum);
    }
  }
}

}  // namespace

cudaError_t LaunchAccumulate(const AccumulateParams& params, cudaStream_t stream) noexcept {
  if (params.heads < 0 || params.tokens < 0) return cudaErrorInvalidValue;
  if (params.tokens == 0) return cudaSuccess;
  const int64_t blocks = std::min(kMaxBlocks, (params.tokens + kThreads - 1) / kThreads);
  Accumulate<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace structkv::cuda
