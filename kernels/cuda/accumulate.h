// Sums over heads and centrality where they are not fused into the saliency kernels: statistics
// that came from the worker or from shards.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace structkv::cuda {

// saliency[j] = sum over heads, in head order, of per_head[h, j]; centrality[j] = decay *
// centrality[j] + saliency[j]. Sums in float32, one rounding each (no fused multiply-add).
struct AccumulateParams {
  const float* per_head = nullptr;  // [heads, tokens], device, not null
  int64_t heads = 0;
  int64_t tokens = 0;
  float* saliency = nullptr;  // [tokens], device; null: not written. May be `per_head` of one head
  float* centrality = nullptr;  // [tokens], device, in place; null: not touched
  float decay = 0.0F;
};

// Asynchronous on `stream`. cudaErrorInvalidValue for a negative size; nothing is launched for 0.
cudaError_t LaunchAccumulate(const AccumulateParams& params, cudaStream_t stream) noexcept;

}  // namespace structkv::cuda
