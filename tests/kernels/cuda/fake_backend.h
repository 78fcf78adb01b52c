// CUDA backends on the fake runtime.
#pragma once

#include <memory>

#include "kernels/backend.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device.h"
#include "tests/kernels/cuda/fake_runtime.h"

namespace structkv::testing {

// Small enough that ordinary tensors take many slices, and odd, so that rows are cut.
inline constexpr int64_t kFakeSliceBytes = 40'009;

// Never null; the GPUs are those of the last FakeCuda::Reset. An event that nobody asks for fails
// the test.
std::unique_ptr<Backend> MakeFakeBackend(
    const cuda::DeviceOptions& options = {.memory_bytes = int64_t{64} << 20,
                                          .lanes = 3,
                                          .slice_bytes = kFakeSliceBytes},
    cuda::CudaEvents events = {});

}  // namespace structkv::testing
