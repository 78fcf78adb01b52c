// The list of backends of programs that test the CUDA backend on the fake runtime.
#include <gtest/gtest.h>

#include <utility>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/reference/reference_backend.h"
#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/cuda/fake_backend.h"
#include "tests/kernels/cuda/on_device.h"

namespace structkv::testing {
namespace {

// "cuda" copies what it reads, "cuda_pinned" finds all of it pinned, "cuda_device" in a GPU's
// memory.
constexpr char kStaged[] = "cuda";
constexpr char kPinned[] = "cuda_pinned";
constexpr char kOnDevice[] = "cuda_device";

}  // namespace

std::vector<std::string> BackendsUnderTest() { return {kStaged, kPinned, kOnDevice}; }

std::unique_ptr<Backend> MakeBackend(const std::string& name) {
  if (name == "reference") return reference::CreateReferenceBackend();
  if (FakeCuda::held() == FakeHeld()) FakeCuda::Reset({.all_pinned = name == kPinned});
  return name == kOnDevice ? OnDevice(MakeFakeBackend()) : MakeFakeBackend();
}

}  // namespace structkv::testing
