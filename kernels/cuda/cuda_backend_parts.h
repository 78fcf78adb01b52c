// The CUDA backend made of given devices: tests have small staging buffers and short waits.
#pragma once

#include <memory>

#include "kernels/backend.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/devices.h"

namespace structkv::cuda {

// Operations without a status go to `host` where a device cannot do them; see CudaEvents.
std::unique_ptr<Backend> MakeCudaBackend(std::unique_ptr<Devices> devices,
                                         std::unique_ptr<Backend> host, CudaEvents events);

}  // namespace structkv::cuda
