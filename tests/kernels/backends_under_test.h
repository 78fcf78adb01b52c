// Every backend that this machine can run, by a name for tests: "reference", "cpu_avx2", ...
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/backend.h"

namespace structkv::testing {

std::vector<std::string> BackendsUnderTest();

// Never null.
std::unique_ptr<Backend> MakeBackend(const std::string& name);

// Runs the tasks from the last to the first on three threads, so that nothing may rely on an order.
void BackwardsOnThreads(int64_t count, absl::FunctionRef<void(int64_t)> task);

}  // namespace structkv::testing
