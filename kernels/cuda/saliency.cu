#include <algorithm>
#include <cmath>

#include "kernels/cuda/saliency.h"
#include "kernels/cuda/saliency_pack.h"
#include "kernels/cuda/saliency_scores.cuh"
#include "kernels/cuda/saliency_weigh.h"

namespace structkv::cuda {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 30;
constexpr int64_t kMaxRows = int64_t{1} << 20;  // of a KV head
constexpr int kPackBlocks = 1024;               // at most; each goes on with what is left
// On a multiprocessor at once.
constexpr int kScoresBlocks = 2;
constexpr int kWeighBlocks = 4;  // at most 64 registers

template <DType kQuery>
__global__ void __launch_bounds__(kSaliencyThreads)
    PackKernel(const __grid_constant__ SaliencyPlan plan) {
  TensorBlock block;
  PackQueries<kQuery>(block, plan);
}

__global__ void __launch_bounds__(kCombineThreads)
    CombineKernel(const __grid_constant__ SaliencyPlan plan) {
  __shared__ Floats2 shared[kCombineThreads];
  TensorBlock block;
  CombineRows(block, plan, shared);
}

__global__ void __launch_bounds__(kSaliencyThreads, kWeighBlocks)
    WeighKernel(const __grid_constant__ SaliencyPlan plan) {
  extern __shared__ float shared[];
  TensorBlock block;
  WeighExps(block, plan, shared);
}

bool Aligned(const void* data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0;
}

cudaError_t Check(const SaliencyRequest& r) {
  const TensorView& q = r.queries;
  const TensorView& k = r.keys;
  const bool shapes = k.heads >= 1 && k.tokens >= 1 && k.tokens <= kMaxTokens && k.dim >= 8 &&
                      k.dim % kPieceDims == 0 && k.dim <= 4096 && q.dim == k.dim && q.heads >= 1 &&
                      q.heads % k.heads == 0 && q.tokens >= 1 && q.tokens <= k.tokens &&
                      q.heads / k.heads <= kMaxRows / q.tokens && k.block_tokens >= 0 &&
                      k.block_tokens <= kMaxTokens && !q.paged() &&
                      (!r.window_max || q.heads == k.heads);
  const bool types = IsFp8(k.dtype) ? !IsFp8(q.dtype) : q.dtype == k.dtype;
  if (!shapes || !types || k.data == nullptr || q.data == nullptr || r.flags == nullptr ||
      r.workspace == nullptr || r.workspace_bytes < SaliencyWorkspaceBytes(r) ||
      !std::isfinite(r.scale)) {
    return cudaErrorInvalidValue;
  }
  if (k.heads > kMaxKvHeads) return cudaErrorNotSupported;
  const int64_t unit = IsFp8(k.dtype) ? 8 : 16;
  const auto bytes = static_cast<int64_t>(DTypeSize(k.dtype));
  if (!Aligned(k.data, unit) || !Aligned(r.workspace, 16) || k.head_stride * bytes % unit != 0 ||
      k.token_stride * bytes % unit != 0 || (k.paged() && k.block_stride * bytes % unit != 0)) {
    return cudaErrorMisalignedAddress;
  }
  return cudaSuccess;
}

cudaError_t LaunchPack(const SaliencyPlan& plan, DType query_type, cudaStream_t stream) {
  const int64_t pieces = PackedIndex(plan, 1, plan.kv_heads, 0, 0);
  const auto blocks = static_cast<int>(
      std::min<int64_t>(kPackBlocks, (pieces + kSaliencyThreads - 1) / kSaliencyThreads));
  switch (query_type) {
    case DType::kF16:
      PackKernel<DType::kF16><<<blocks, kSaliencyThreads, 0, stream>>>(plan);
      break;
    case DType::kBF16:
      PackKernel<DType::kBF16><<<blocks, kSaliencyThreads, 0, stream>>>(plan);
      break;
    default:
      PackKernel<DType::kF32><<<blocks, kSaliencyThreads, 0, stream>>>(plan);
  }
  return cudaGetLastError();
}

cudaError_t LaunchScores(const SaliencyRequest& r, const SaliencyPlan& plan, bool store,
                         const TileLaunch& launch) {
  switch (r.keys.dtype) {
    case DType::kF16:
      return LaunchScoresF16(plan, store, launch);
    case DType::kBF16:
      return LaunchScoresBF16(plan, store, launch);
    case DType::kF32:
      return LaunchScoresF32(plan, store, launch);
    case DType::kF8E4M3:
      return LaunchScoresE4M3(plan, r.queries.dtype, store, launch);
    case DType::kF8E5M2:
      return LaunchScoresE5M2(plan, r.queries.dtype, store, launch);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t LaunchSaliency(const SaliencyRequest& params, cudaStream_t stream) noexcept {
  if (const cudaError_t error = Check(params); error != cudaSuccess) return error;
  int device = 0;
  int multiprocessors = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess) {
    return error;
  }
  SaliencyPlan plan = MakeSaliencyPlan(params);
  LayOutWorkspace(&plan, params.queries.dtype, params.workspace);
  if (const cudaError_t error = cudaMemsetAsync(params.flags, 0xFF, sizeof(*params.flags), stream);
      error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = LaunchPack(plan, params.queries.dtype, stream);
      error != cudaSuccess) {
    return error;
  }
  const TileLaunch outputs = {std::min(plan.tiles, multiprocessors * kScoresBlocks),
                              plan.kv_heads * plan.tile_tokens() * static_cast<int>(sizeof(float)),
                              stream};
  if (params.lse != nullptr) return LaunchScores(params, plan, /*store=*/false, outputs);
  TileLaunch stored = outputs;
  stored.shared_bytes = 0;
  if (const cudaError_t error = LaunchScores(params, plan, /*store=*/true, stored);
      error != cudaSuccess) {
    return error;
  }
  CombineKernel<<<plan.kv_heads * plan.padded_rows() / kCombineRows, kCombineThreads, 0, stream>>>(
      plan);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  TileLaunch weighed = outputs;
  weighed.blocks = plan.tiles;
  return LaunchTiles(&WeighKernel, plan, weighed);
}

}  // namespace structkv::cuda
