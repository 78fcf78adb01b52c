// What NCCL's callers need of CUDA, by way of the driver.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "service/transport/nccl/device_api.h"

namespace structkv::client::internal {

// Of the driver that is found at run time, for the GPU `ordinal`, whose primary context is held
// from then on. One library for all GPUs: the first call's. Errors as CudaDevice::Open.
absl::StatusOr<nccl::DeviceApi> DriverDeviceApi(const std::string& library, int ordinal);

}  // namespace structkv::client::internal
