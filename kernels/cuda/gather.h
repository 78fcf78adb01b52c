// Copies scattered rows of keys and values, of any number of layers at once, and moves keys to
// other positions on their way.
//
// What is kept at 10 % of a layer of 131,072 tokens, 8 heads of 128 in 16 bits, is 54 MB of keys
// and values, read and written once: 25 microseconds at 4.3 TB/s. A thread has four loads of 16
// bytes in flight; not yet measured.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/rotation.h"
#include "kernels/tensor.h"

namespace structkv::cuda {

// Rows of one tensor. All pointers, the block table's included, are unified addresses: device
// memory, or host memory that is pinned and mapped. Rows are copied as fast as alignment lets them:
// 16 bytes at a time where data, strides and rows are multiples of 16 on both sides, else 8, 4, 2
// or 1.
struct GatherJob {
  // [heads, tokens, dim], any element type, dense or paged; not null. At most 2^31 - 1 tokens.
  TensorView source;
  // [kept], or [heads, kept] where `per_head`; not null; each in the source.
  const int32_t* positions = nullptr;
  bool per_head = false;
  // [heads, kept, dim], the source's heads, dim and dtype, dense or paged; not null, may not
  // overlap what is read. Nothing kept: the job is passed over. What lies behind the last token in
  // a last block is not written.
  MutableTensorView destination;
};

struct GatherParams {
  const GatherJob* jobs = nullptr;  // [job_count], host; read before the call returns
  int64_t job_count = 0;
};

// Keys of F32, F16 or BF16, rows of at most 8192 bytes, that are moved to other positions
// (kernels/rotation.h). `rotation` points to the device's memory as the job does; its positions are
// shaped as the job's.
struct GatherRotatedJob {
  GatherJob rows;
  RotationParams rotation;
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
