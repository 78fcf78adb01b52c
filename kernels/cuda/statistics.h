// What follows from a layer's saliency at each token, before selection (kernels/cuda/select.h), for
// saliency that LaunchSaliency has not computed, or computed in several calls.
//
// 131,072 tokens of 8 heads are 4.2 MB in and 1.0 MB out for the sum and centrality: 1.2
// microseconds at 4.3 TB/s, if they were not in the L2 cache already, as they are right after they
// were written. One launch; the logarithms in double precision, 1,000 a multiprocessor, should be
// hidden; not yet measured.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/statistics_kernel.h"

namespace structkv::cuda {

// Both are ordered on the stream and do not wait for it. cudaErrorInvalidValue where the params are
// not as described. Results do not depend on how blocks run.
cudaError_t LaunchStatistics(const StatisticsParams& params, cudaStream_t stream) noexcept;
cudaError_t LaunchPool(const PoolParams& params, cudaStream_t stream) noexcept;

}  // namespace structkv::cuda
