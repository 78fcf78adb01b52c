#include "tests/kernels/cuda/fake_backend.h"

#include <gtest/gtest.h>

#include <utility>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend_parts.h"

namespace structkv::testing {

std::unique_ptr<Backend> MakeFakeBackend(const cuda::DeviceOptions& options,
                                         cuda::CudaEvents events) {
  auto devices = cuda::Devices::Open(options);
  EXPECT_TRUE(devices.ok()) << devices.status();
  if (!events.fell_back) {
    events.fell_back = [](const absl::Status& why) { ADD_FAILURE() << "went to the CPU: " << why; };
  }
  if (!events.not_pinned) {
    events.not_pinned = [](const absl::Status& why) { ADD_FAILURE() << "not pinned: " << why; };
  }
  return cuda::MakeCudaBackend(*std::move(devices), *cpu::CreateCpuBackend(), std::move(events));
}

}  // namespace structkv::testing
