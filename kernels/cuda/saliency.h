// Local saliency (docs/method.md, section 1) on the GPU.
//
// One warp takes the keys of one KV head for 64 tokens at a time; with 8 KV heads the 8 warps of a
// block take the same tokens, and the sum over the heads is made in the block. Keys go from device
// memory to the tensor cores without a stop (kernels/cuda/fragments.h); packed queries stay in the
// L1 cache, which the keys pass by. No atomic addition anywhere: results depend on the shapes and
// values alone.
//
// Bytes in flight: a warp asks for 16 keys at once, 4 KB at 128 elements of 16 bits; 16 warps on a
// multiprocessor make 64 KB, and a third of that, 23 KB, fills an H200 (4.3 TB/s times 700 ns over
// 132 multiprocessors), so a warp may spend two thirds of its time on arithmetic. Under a given
// log-sum-exp, with 64 or 128 elements of 16 bits, it weighs scores while the next keys are on
// their way.
//
// With the caller's log-sum-exp the keys are read once and nothing else of their size. Without it
// the exponentials of every row, relative to the highest score of 16 tokens, are kept in float16 (2
// bytes for each row and token, and 8 bytes for each row and 16 tokens), and weighed by a third
// kernel, under what a second makes of the 8 bytes. The weighing has a warp ask for 16 tokens'
// exponentials under 32 rows and their highest scores at once, 1.25 KB; 32 warps on a
// multiprocessor make 40 KB. Their rounding is 2^-11 of a weight, once in it and once in the row's
// sum, and where a weight is below 2^-14 of the highest within its 16 tokens, 2^-25 of that
// highest.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/saliency_plan.h"

namespace structkv::cuda {

// Fills out the outputs named in `params` (kernels/cuda/saliency_plan.h). Asynchronous on `stream`,
// on the current device. cudaErrorInvalidValue where shapes, types or the workspace do not fit,
// cudaErrorMisalignedAddress where the keys' data or strides are no multiples of 16 bytes (8-bit
// keys: 8), cudaErrorNotSupported for more than kMaxKvHeads heads.
cudaError_t LaunchSaliency(const SaliencyRequest& params, cudaStream_t stream) noexcept;

}  // namespace structkv::cuda
