// A layer's local saliency on the GPU, of the host's memory or its own, to the host's.
#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/devices.h"

namespace structkv::cuda {

// As Backend::Saliency; `params` are valid (kernels/saliency_checks.h). Heads go to the device in
// as few groups as kMaxKvHeads and the pool allow, and results do not depend on them.
// Keys in device memory are read where they are if their alignment allows it (SaliencyRequest), and
// are copied otherwise. RESOURCE_EXHAUSTED where not even one head fits, or as Devices::AcquireOn.
absl::Status Saliency(Devices& devices, const SaliencyParams& params, float* out,
                      BadStatistic* bad);

// As Backend::CheckRoom.
absl::Status CheckRoom(const Devices& devices, const SaliencyParams& params, bool keys_on_device);

}  // namespace structkv::cuda
