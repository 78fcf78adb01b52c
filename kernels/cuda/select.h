// The best tokens of rows of scores, and the mass of the largest.
//
// A row of up to 350,000 tokens, where a block can have 227 KB of shared memory, is one cluster of
// at most 8 blocks, and all rows together are one launch: of 131,072 tokens 0.5 MB are read once,
// and then each block passes five times over the 64 KB in its shared memory, with five barriers of
// the cluster. By its instructions that takes 10 microseconds on an H200, for one row as for 16;
// not yet measured. Longer rows, and most of those of chips without clusters, take five launches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/select_plan.h"

namespace structkv::cuda {

struct SelectParams {
  const SelectRow* rows = nullptr;  // [row_count], host, not null; read before the call returns
  int64_t row_count = 0;
  // [scratch_bytes], device, aligned to 256 bytes, SelectScratchBytes of them at least; may be null
  // where that is 0. In use until the stream is done.
  void* scratch = nullptr;
  int64_t scratch_bytes = 0;
  SelectLimits limits;
};

// Those of `device`.
cudaError_t GetSelectLimits(int device, SelectLimits* limits) noexcept;

// Selects, ordered on the stream, without waiting for it. Equal rows give equal results, bit for
// bit, whichever way they go. cudaErrorInvalidValue where a row or the scratch memory is not as
// described.
cudaError_t LaunchSelect(const SelectParams& params, cudaStream_t stream) noexcept;

}  // namespace structkv::cuda
