// The CUDA runtime as a DeviceApi. Only where nvcc is found.
#pragma once

#include "service/transport/nccl/device_api.h"

namespace structkv::nccl {

DeviceApi CudaDeviceApi();

}  // namespace structkv::nccl
