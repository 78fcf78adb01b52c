// The kernels that read the keys, one source file for each type of them.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/saliency_plan.h"

namespace structkv::cuda {

// How a kernel over tiles is launched.
struct TileLaunch {
  int blocks;        // no more than there are tiles
  int shared_bytes;  // [kv_heads, tile tokens] of float
  cudaStream_t stream;
};

// Scores of keys of one type under queries of `query_type` (kernels/cuda/saliency_steps.h):
// exponentials where `store`, else outputs. cudaErrorInvalidValue for any other type of query.
cudaError_t LaunchScoresF16(const SaliencyPlan& plan, bool store, const TileLaunch& launch);
cudaError_t LaunchScoresBF16(const SaliencyPlan& plan, bool store, const TileLaunch& launch);
cudaError_t LaunchScoresF32(const SaliencyPlan& plan, bool store, const TileLaunch& launch);
cudaError_t LaunchScoresE4M3(const SaliencyPlan& plan, DType query_type, bool store,
                             const TileLaunch& launch);
cudaError_t LaunchScoresE5M2(const SaliencyPlan& plan, DType query_type, bool store,
                             const TileLaunch& launch);

}  // namespace structkv::cuda
