// The list of backends of programs that test the CUDA backend on the fake runtime.
#include <gtest/gtest.h>

#include <utility>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/reference/reference_backend.h"
#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/cuda/fake_backend.h"

namespace structkv::testing {
namespace {

// "cuda" copies what it reads, "cuda_pinned" finds all of it pinned.
constexpr char kStaged[] = "cuda";
constexpr char kPinned[] = "cuda_pinned";

}  // namespace

std::vector<std::string> BackendsUnderTest() { return {kStaged, kPinned}; }

std::unique_ptr<Backend> MakeBackend(const std::string& name) {
  if (name == "reference") return reference::CreateReferenceBackend();
  if (FakeCuda::held() == FakeHeld()) FakeCuda::Reset({.all_pinned = name == kPinned});
  return MakeFakeBackend();
}

}  // namespace structkv::testing
