#include <algorithm>

#include "kernels/cuda/device_block.h"
#include "kernels/cuda/select_plan.h"
#include "kernels/cuda/statistics.h"

namespace structkv::cuda {
namespace {

constexpr int kPoolThreads = 256;
constexpr int64_t kMaxPoolRows = 65535;  // of a grid's second axis

__global__ void __launch_bounds__(kStatisticsThreads)
    Statistics(const __grid_constant__ StatisticsParams params) {
  DeviceBlock block;
  TileStatistics(block, params);
}

__global__ void __launch_bounds__(kPoolThreads) Pool(const __grid_constant__ PoolParams params) {
  const int64_t token = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x;
  if (token >= params.tokens) return;
  const int64_t row = blockIdx.y * params.row_stride;
  params.out[row + token] =
      PoolAt(params.in + row, params.tokens, params.smoothing, params.kernel, token);
}

}  // namespace

cudaError_t LaunchStatistics(const StatisticsParams& params, cudaStream_t stream) noexcept {
  if (params.values == nullptr || params.heads < 1 || params.heads > kMaxTokens ||
      params.tokens < 1 || params.tokens > kMaxTokens) {
    return cudaErrorInvalidValue;
  }
  Statistics<<<static_cast<unsigned>(Tiles(params.tokens)), kStatisticsThreads, 0, stream>>>(
      params);
  return cudaGetLastError();
}

cudaError_t LaunchPool(const PoolParams& params, cudaStream_t stream) noexcept {
  if (params.in == nullptr || params.out == nullptr || params.rows < 1 ||
      params.rows > kMaxPoolRows || params.tokens < 1 || params.tokens > kMaxTokens ||
      params.row_stride < params.tokens || params.kernel < 1 || params.kernel % 2 == 0 ||
      params.smoothing > Smoothing::kMaximum) {
    return cudaErrorInvalidValue;
  }
  const int64_t blocks = (params.tokens + kPoolThreads - 1) / kPoolThreads;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(params.rows));
  Pool<<<grid, kPoolThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace structkv::cuda
