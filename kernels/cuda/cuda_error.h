// What the errors of the CUDA runtime mean.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace structkv::cuda {

// Whether the error stays: every later call of this process on that device fails too.
bool IsSticky(cudaError_t error);

// OK for cudaSuccess; otherwise "`what`: the error's text (its name)", UNAVAILABLE where it is
// sticky, RESOURCE_EXHAUSTED where memory ran out, INTERNAL for any other. Clears the thread's last
// error, which the next launch would take for its own.
absl::Status CudaStatus(cudaError_t error, std::string_view what);

// How often CudaStatus was not OK in this process, by the error's name.
std::map<std::string, int64_t> CountedErrors();

}  // namespace structkv::cuda
