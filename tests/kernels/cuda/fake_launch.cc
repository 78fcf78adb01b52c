// The launchers of kernels/cuda on the fake runtime.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cuda/gather.h"
#include "kernels/cuda/saliency.h"
#include "kernels/cuda/select.h"
#include "kernels/cuda/statistics.h"
#include "tests/kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/emulated_saliency.h"
#include "tests/kernels/cuda/fake_runtime.h"

namespace structkv::cuda {
namespace {

using testing::FakeCuda;

constexpr int kBlocks = 2;          // of the grids
constexpr int kSelectThreads = 32;  // of a block: each costs a stack

bool IsAligned(const void* data, int64_t stride, int64_t unit) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(unit) == 0 &&
         stride % unit == 0;
}

}  // namespace

cudaError_t LaunchSaliency(const SaliencyRequest& params, cudaStream_t stream) noexcept {
  const int64_t unit = IsFp8(params.keys.dtype) ? 8 : 16;
  const auto element = static_cast<int64_t>(DTypeSize(params.keys.dtype));
  if (params.keys.heads > kMaxKvHeads || params.workspace_bytes < SaliencyWorkspaceBytes(params) ||
      !IsAligned(params.keys.data, params.keys.head_stride * element, unit) ||
      !IsAligned(params.keys.data, params.keys.token_stride * element, unit) ||
      !IsAligned(params.workspace, 0, 16)) {
    return cudaErrorInvalidValue;
  }
  return FakeCuda::Launch(stream, [params] { testing::EmulateSaliency(params, kBlocks); });
}

cudaError_t GetSelectLimits(int device, SelectLimits* limits) noexcept {
  int clusters = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  if (error != cudaSuccess) return error;
  // Long rows go through device memory.
  *limits = {clusters != 0 ? 2 : 1, 100 << 10, 1};
  return cudaSuccess;
}

cudaError_t LaunchSelect(const SelectParams& params, cudaStream_t stream) noexcept {
  const std::vector<SelectRow> rows(params.rows, params.rows + params.row_count);
  for (const SelectRow& row : rows) {
    if (!IsValid(row)) return cudaErrorInvalidValue;
  }
  const int64_t needed = SelectScratchBytes(params.rows, params.row_count, params.limits);
  if (params.scratch_bytes < needed) return cudaErrorInvalidValue;
  return FakeCuda::Launch(stream, [rows, needed, params] {
    const SelectLimits& limits = params.limits;
    std::memset(params.scratch, 0xCD, static_cast<size_t>(needed));
    for (const SelectRow& row : rows) {
      const int blocks = ClusterBlocks(row, limits);
      testing::RunCudaSelect({blocks > 0, blocks > 0 ? blocks : kBlocks, kSelectThreads}, {row});
    }
  });
}

cudaError_t LaunchStatistics(const StatisticsParams& params, cudaStream_t stream) noexcept {
  if (params.values == nullptr || params.heads < 1 || params.tokens < 1) {
    return cudaErrorInvalidValue;
  }
  return FakeCuda::Launch(stream, [params] { testing::RunCudaStatistics(params); });
}

cudaError_t LaunchPool(const PoolParams& params, cudaStream_t stream) noexcept {
  if (params.in == nullptr || params.out == nullptr || params.rows < 1 || params.tokens < 1 ||
      params.row_stride < params.tokens || params.kernel % 2 == 0) {
    return cudaErrorInvalidValue;
  }
  return FakeCuda::Launch(stream, [params] { testing::RunCudaPool(params); });
}

cudaError_t LaunchGather(const GatherParams& params, cudaStream_t stream) noexcept {
  const std::vector<GatherJob> jobs(params.jobs, params.jobs + params.job_count);
  if (!std::all_of(jobs.begin(), jobs.end(), [](const GatherJob& job) { return IsValid(job); })) {
    return cudaErrorInvalidValue;
  }
  return FakeCuda::Launch(stream, [jobs] { testing::RunCudaGather(jobs); });
}

cudaError_t LaunchGatherRotated(const GatherRotatedParams& params, cudaStream_t stream) noexcept {
  const std::vector<GatherRotatedJob> jobs(params.jobs, params.jobs + params.job_count);
  if (!std::all_of(jobs.begin(), jobs.end(),
                   [](const GatherRotatedJob& job) { return IsValid(job); })) {
    return cudaErrorInvalidValue;
  }
  return FakeCuda::Launch(stream, [jobs] { testing::RunCudaGatherRotated(jobs); });
}

}  // namespace structkv::cuda
