#include "kernels/cuda/cuda_error.h"

#include <mutex>
#include <string>

#include "absl/strings/str_cat.h"

namespace structkv::cuda {
namespace {

// Errors are CUDA's, whose state is the process's; so is their count.
struct Counted {
  std::mutex mutex;
  std::map<std::string, int64_t> by_name;
};

Counted& AllCounted() {
  static auto& counted = *new Counted;
  return counted;
}

}  // namespace

bool IsSticky(cudaError_t error) {
  switch (error) {
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorContained:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorTensorMemoryLeak:
    case cudaErrorMpsClientTerminated:
    case cudaErrorExternalDevice:
      return true;
    default:
      return false;
  }
}

absl::Status CudaStatus(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  (void)cudaGetLastError();
  {
    const std::lock_guard lock(AllCounted().mutex);
    ++AllCounted().by_name[cudaGetErrorName(error)];
  }
  const std::string text = absl::StrCat(std::string(what), ": ", cudaGetErrorString(error), " (",
                                        cudaGetErrorName(error), ")");
  if (IsSticky(error)) return absl::UnavailableError(text);
  if (error == cudaErrorMemoryAllocation) return absl::ResourceExhaustedError(text);
  return absl::InternalError(text);
}

std::map<std::string, int64_t> CountedErrors() {
  const std::lock_guard lock(AllCounted().mutex);
  return AllCounted().by_name;
}

}  // namespace structkv::cuda
