// Pages of the host that every GPU copies from, and reads, by itself.
#pragma once

#include <functional>

#include "absl/status/status.h"
#include "kernels/host_pinning.h"

namespace structkv::cuda {

// By way of the CUDA device `device`. Pins until it fails for the first time, which `failed` is
// told, on any thread, and then nothing any more; it may be null.
HostPinning MakeHostPinning(int device, std::function<void(const absl::Status&)> failed);

}  // namespace structkv::cuda
