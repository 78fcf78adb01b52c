// The backends that a program's tests are of, by a name for tests. Which they are depends on what
// the program is linked with: every one that a machine without a GPU can run ("reference",
// "cpu_avx2",
// ...), "cuda" on a fake runtime (cuda/fake_backends.cc), or "cuda" on a GPU
// (tests/gpu/device_backends.cc).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/backend.h"

namespace structkv::testing {

std::vector<std::string> BackendsUnderTest();

// Never null. "reference" is one everywhere.
std::unique_ptr<Backend> MakeBackend(const std::string& name);

// Runs the tasks from the last to the first on three threads, so that nothing may rely on an order.
void BackwardsOnThreads(int64_t count, absl::FunctionRef<void(int64_t)> task);

}  // namespace structkv::testing
