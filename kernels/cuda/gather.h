// Copies scattered rows of keys and values, of any number of layers at once, and moves keys to
// other positions on their way.
//
// What is kept at 10 % of a layer of 131,072 tokens, 8 heads of 128 in 16 bits, is 54 MB of keys
// and values, read and written once: 25 microseconds at 4.3 TB/s. A thread has four loads of 16
// bytes in flight; not yet measured.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/gather_plan.h"

namespace structkv::cuda {

struct GatherParams {
  const GatherJob* jobs = nullptr;  // [job_count], host; read before the call returns
  int64_t job_count = 0;
};

struct GatherRotatedParams {
  const GatherRotatedJob* jobs = nullptr;  // [job_count], host; read before the call returns
  int64_t job_count = 0;
};

// Both are ordered on the stream and do not wait for it; up to 32 jobs (rotated: 24) are one
// launch. cudaErrorInvalidValue where a job is not as described: nothing was launched then.
// cudaErrorNotSupported for more than 2^31 - 1 blocks of rows in one job.
cudaError_t LaunchGather(const GatherParams& params, cudaStream_t stream) noexcept;
cudaError_t LaunchGatherRotated(const GatherRotatedParams& params, cudaStream_t stream) noexcept;

}  // namespace structkv::cuda
