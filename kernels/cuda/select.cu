#include <algorithm>

#include "kernels/cuda/device_block.h"
#include "kernels/cuda/select.h"

namespace structkv::cuda {
namespace {

struct Rows {
  SelectRow row[kSelectRows];
};

// The rows' state in device memory, one after the other.
struct States {
  unsigned char* begin = nullptr;
  int64_t offset[kSelectRows];
};

// Has the number of a warp from a shuffle, of which the compiler knows that it gives all lanes the
// same: what depends on it does not divide a warp, and needs no code for one that is divided.
class SelectBlock : public DeviceBlock {
 public:
  __device__ int warp() const { return warp_; }

 private:
  const int warp_ = Shuffle(DeviceBlock::warp(), 0);
};

__global__ void __launch_bounds__(kClusterThreads)
    SelectInCluster(const __grid_constant__ Rows rows) {
  extern __shared__ __align__(16) unsigned char shared[];
  SelectBlock block;
  ClusterSelector<SelectBlock>(block, rows.row[blockIdx.y], shared).Run();
}

// Grid: blocks of a row, rows.
template <class Step>
__device__ void RunGlobal(const Rows& rows, const States& states, const Step& step) {
  __shared__ GlobalShared shared;
  SelectBlock block;
  GlobalSelector<SelectBlock> selector(block, rows.row[blockIdx.y],
                                       states.begin + states.offset[blockIdx.y], shared);
  step(selector);
}

__global__ void __launch_bounds__(kGlobalThreads)
    FindSelectDigit(const __grid_constant__ Rows rows, const __grid_constant__ States states,
                    int digit) {
  RunGlobal(rows, states, [digit](auto& selector) { selector.FindDigit(digit); });
}

__global__ void __launch_bounds__(kGlobalThreads)
    MeasureSelection(const __grid_constant__ Rows rows, const __grid_constant__ States states) {
  RunGlobal(rows, states, [](auto& selector) { selector.Measure(); });
}

__global__ void __launch_bounds__(kGlobalThreads)
    WriteSelection(const __grid_constant__ Rows rows, const __grid_constant__ States states) {
  RunGlobal(rows, states, [](auto& selector) { selector.Write(); });
}

cudaError_t LaunchCluster(const Rows& rows, const SelectRun& run, const SelectLimits& limits,
                          cudaStream_t stream) {
  // The attribute is the kernel's on the device, shared by threads that launch at once. All set it
  // to the same value, that of the device, so that none lowers it before another's launch.
  const cudaError_t error =
      cudaFuncSetAttribute(SelectInCluster, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(limits.shared_bytes));
  if (error != cudaSuccess) return error;
  const int64_t tiles = SliceOf(run.tokens, 0, run.cluster_blocks).tiles;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(run.cluster_blocks);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(run.cluster_blocks), static_cast<unsigned>(run.rows));
  config.blockDim = dim3(kClusterThreads);
  config.dynamicSmemBytes = static_cast<size_t>(ClusterSharedBytes(tiles));
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = run.cluster_blocks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, SelectInCluster, rows);
}

cudaError_t LaunchGlobal(const Rows& rows, const SelectRun& run, const SelectParams& params,
                         cudaStream_t stream) {
  States states;
  states.begin = static_cast<unsigned char*>(params.scratch);
  int64_t offset = 0;
  for (int64_t r = 0; r < run.rows; ++r) {
    states.offset[r] = offset;
    // The tiles' arrays are written before they are read.
    const cudaError_t error =
        cudaMemsetAsync(states.begin + offset, 0, sizeof(GlobalState), stream);
    if (error != cudaSuccess) return error;
    offset += GlobalStateBytes(rows.row[r].tokens);
  }
  constexpr int64_t kWarps = kGlobalThreads / 32;
  const int64_t most = std::max<int64_t>(1, 4 * params.limits.multiprocessors / run.rows);
  const int64_t blocks = std::min(most, (Tiles(run.tokens) + kWarps - 1) / kWarps);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(run.rows));
  for (int digit = 0; digit < kDigits; ++digit) {
    FindSelectDigit<<<grid, kGlobalThreads, 0, stream>>>(rows, states, digit);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  MeasureSelection<<<grid, kGlobalThreads, 0, stream>>>(rows, states);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  WriteSelection<<<grid, kGlobalThreads, 0, stream>>>(rows, states);
  return cudaGetLastError();
}

}  // namespace

cudaError_t GetSelectLimits(int device, SelectLimits* limits) noexcept {
  int clusters = 0;
  int shared_bytes = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  *limits = {clusters != 0 ? kMaxClusterBlocks : 1, shared_bytes, multiprocessors};
  return cudaSuccess;
}

cudaError_t LaunchSelect(const SelectParams& params, cudaStream_t stream) noexcept {
  if (params.row_count < 0 || (params.row_count > 0 && params.rows == nullptr)) {
    return cudaErrorInvalidValue;
  }
  for (int64_t r = 0; r < params.row_count; ++r) {
    if (!IsValid(params.rows[r])) return cudaErrorInvalidValue;
  }
  const int64_t needed = SelectScratchBytes(params.rows, params.row_count, params.limits);
  if (needed > params.scratch_bytes || (needed > 0 && params.scratch == nullptr)) {
    return cudaErrorInvalidValue;
  }
  for (int64_t r = 0; r < params.row_count;) {
    const SelectRun run = NextRun(params.rows + r, params.row_count - r, params.limits);
    Rows rows;
    std::copy_n(params.rows + r, run.rows, rows.row);
    const cudaError_t error = run.cluster_blocks > 0
                                  ? LaunchCluster(rows, run, params.limits, stream)
                                  : LaunchGlobal(rows, run, params, stream);
    if (error != cudaSuccess) return error;
    r += run.rows;
  }
  return cudaSuccess;
}

}  // namespace structkv::cuda
