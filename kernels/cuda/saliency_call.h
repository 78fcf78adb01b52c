// A layer's local saliency on the GPU, of and to the host's memory.
#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/devices.h"

namespace structkv::cuda {

// As Backend::Saliency; `params` are valid (kernels/saliency_checks.h). Heads go to the device in
// as few groups as kMaxKvHeads and the pool allow, and results do not depend on them.
// RESOURCE_EXHAUSTED where not even one head fits, or as Device::Acquire.
absl::Status Saliency(Devices& devices, const SaliencyParams& params, float* out,
                      BadStatistic* bad);

}  // namespace structkv::cuda
