// NVIDIA GPUs as a backend for tensors in the host's memory and in theirs. Knows no CUDA type: a
// program without nvcc can include it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace structkv::cuda {

// What an operator should know; told once each, on any thread. Either may be null.
struct CudaEvents {
  // Why an operation went to the CPU, the first time that one did.
  std::function<void(const absl::Status&)> fell_back;
  // Why host memory stays pageable from now on (Backend::host_pinning): it is as good, and slower.
  std::function<void(const absl::Status&)> not_pinned;
};

struct CudaOptions {
  // Memory taken of each GPU at the start, at least 64 MiB; it never grows. 0: half of what is free
  // then.
  int64_t device_memory_bytes = 0;
  // Of that, set apart for Backend::Reserve; 0: half. None: nothing can be reserved.
  std::optional<int64_t> reserve_bytes;
  CudaEvents events;
};

// A backend on all GPUs that this process sees. Each call goes to the one with the most free
// memory, on a stream of its own, and waits there for its turn: in the order of the calls, as long
// as others end, so that no call fails because there are many.
//
// Saliency is RESOURCE_EXHAUSTED where no call has ended for 10 seconds while it waited, where not
// even one of its KV heads fits into the memory, or where CUDA itself runs out. The other
// operations, which have no status, go to the CPU then, with the caller's `parallel`. After an
// error that only a new process clears Health() is UNAVAILABLE and every operation returns at once.
//
// Without the caller's log-sum-exp, weights are rounded to float16 on their way
// (kernels/cuda/saliency.h).
//
// NOT_FOUND, with what CUDA says, where there is no GPU; FAILED_PRECONDITION where none is new
// enough; RESOURCE_EXHAUSTED where one has not so much memory free; otherwise what CUDA's first
// call fails with.
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(CudaOptions options);

}  // namespace structkv::cuda
