// The list of backends of programs that test the CUDA backend on GPUs. Where there is none, no test
// of the program runs, and it says so.
#include <gtest/gtest.h>

#include <utility>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend_parts.h"
#include "kernels/reference/reference_backend.h"
#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/on_device.h"

namespace structkv::testing {
namespace {

class NeedsGpu : public ::testing::Environment {
  void SetUp() override {
    if (const std::string why = WhyNoCuda(); !why.empty()) GTEST_SKIP() << "SKIPPED: " << why;
  }
};
const auto* const needs_gpu = ::testing::AddGlobalTestEnvironment(new NeedsGpu());

}  // namespace

std::vector<std::string> BackendsUnderTest() { return {"cuda", "cuda_device"}; }

std::unique_ptr<Backend> MakeBackend(const std::string& name) {
  if (name == "reference") return reference::CreateReferenceBackend();
  // Every test makes one: small ones, whose slices are smaller than many tensors.
  auto devices = cuda::Devices::Open(
      {.memory_bytes = int64_t{1} << 30, .lanes = 3, .slice_bytes = int64_t{1} << 18});
  EXPECT_TRUE(devices.ok()) << devices.status();
  std::unique_ptr<Backend> backend = cuda::MakeCudaBackend(
      *std::move(devices), *cpu::CreateCpuBackend(),
      {.fell_back = [](const absl::Status& why) { ADD_FAILURE() << "went to the CPU: " << why; }});
  return name == "cuda_device" ? OnDevice(std::move(backend)) : std::move(backend);
}

}  // namespace structkv::testing
