#include "tests/kernels/backends_under_test.h"

#include <gtest/gtest.h>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/reference/reference_backend.h"

namespace structkv::testing {
namespace {

constexpr std::string_view kCpuPrefix = "cpu_";

}  // namespace

std::vector<std::string> BackendsUnderTest() {
  std::vector<std::string> names = {"reference"};
  for (std::string_view target : cpu::CpuTargets()) {
    names.push_back(std::string(kCpuPrefix) + std::string(target));
  }
  return names;
}

std::unique_ptr<Backend> MakeBackend(const std::string& name) {
  if (name == "reference") return reference::CreateReferenceBackend();
  const std::string target = name.substr(kCpuPrefix.size());
  auto backend = cpu::CreateCpuBackend({.target = target});
  EXPECT_TRUE(backend.ok()) << backend.status();
  return *std::move(backend);
}

}  // namespace structkv::testing
