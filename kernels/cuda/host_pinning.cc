#include "kernels/cuda/host_pinning.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_error.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/staging.h"

namespace structkv::cuda {
namespace {

absl::Status Pin(int device, void* data, int64_t bytes) {
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return CudaStatus(error, "cudaSetDevice");
  error = cudaHostRegister(data, static_cast<size_t>(bytes), cudaHostRegisterPortable);
  if (error != cudaSuccess) {
    return CudaStatus(error, absl::StrCat("cudaHostRegister of ", bytes, " bytes"));
  }
  if (IsPinned(data, bytes)) return absl::OkStatus();
  // A GPU has it at another address than the host, which calls make no use of.
  (void)cudaHostUnregister(data);
  return absl::FailedPreconditionError(
      "cudaHostRegister: GPUs cannot use the host's addresses of pinned memory");
}

}  // namespace

HostPinning MakeHostPinning(int device, std::function<void(const absl::Status&)> failed) {
  const auto off = std::make_shared<std::atomic<bool>>(false);
  const auto pin = [device, failed = std::move(failed), off](void* data, int64_t bytes) {
    if (off->load()) return false;
    const absl::Status status = Pin(device, data, bytes);
    if (status.ok()) return true;
    if (!off->exchange(true) && failed) failed(status);
    return false;
  };
  return {.least_bytes = kDirectBytes, .pin = pin, .unpin = [](void* data) {
            (void)cudaHostUnregister(data);
          }};
}

}  // namespace structkv::cuda
