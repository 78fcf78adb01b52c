// CUDA backends on the fake runtime.
#pragma once

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/device.h"
#include "tests/kernels/cuda/fake_runtime.h"

namespace structkv::testing {

// Small enough that ordinary tensors take many slices, and odd, so that rows are cut.
inline constexpr int64_t kFakeSliceBytes = 40'009;

// Never null; the GPUs are those of the last FakeCuda::Reset. What falls back to the CPU is told to
// `fell_back`; null: fails the test.
std::unique_ptr<Backend> MakeFakeBackend(
    const cuda::DeviceOptions& options = {.memory_bytes = int64_t{64} << 20,
                                          .lanes = 3,
                                          .slice_bytes = kFakeSliceBytes},
    std::function<void(const absl::Status&)> fell_back = nullptr);

}  // namespace structkv::testing
