// The CUDA backend made of given devices: tests have small staging buffers and short waits.
#pragma once

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/devices.h"

namespace structkv::cuda {

// Operations without a status go to `host` where a device cannot do them; see CudaOptions.
std::unique_ptr<Backend> MakeCudaBackend(std::unique_ptr<Devices> devices,
                                         std::unique_ptr<Backend> host,
                                         std::function<void(const absl::Status&)> fell_back);

}  // namespace structkv::cuda
