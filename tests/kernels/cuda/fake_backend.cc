#include "tests/kernels/cuda/fake_backend.h"

#include <gtest/gtest.h>

#include <utility>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend_parts.h"

namespace structkv::testing {

std::unique_ptr<Backend> MakeFakeBackend(const cuda::DeviceOptions& options,
                                         std::function<void(const absl::Status&)> fell_back) {
  auto devices = cuda::Devices::Open(options);
  EXPECT_TRUE(devices.ok()) << devices.status();
  if (!fell_back) {
    fell_back = [](const absl::Status& why) { ADD_FAILURE() << "went to the CPU: " << why; };
  }
  return cuda::MakeCudaBackend(*std::move(devices), *cpu::CreateCpuBackend(), std::move(fell_back));
}

}  // namespace structkv::testing
