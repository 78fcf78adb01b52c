// Kept rows by the GPU, from and to the host's memory.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/devices.h"
#include "kernels/rotation.h"
#include "kernels/tensor.h"

namespace structkv::cuda {

// As Backend::Gather and GatherRotated. Of a source in pinned memory the kernels read the rows
// where they are; of any other the host packs them on their way to the device, so that the bus
// carries nothing that is not kept. Errors are those of Device::Acquire and Device::Check.
absl::Status Gather(Devices& devices, const TensorView& source, const int32_t* positions,
                    bool per_head, const MutableTensorView& destination);
absl::Status GatherRotated(Devices& devices, const TensorView& source, const int32_t* rows,
                           bool per_head, const RotationParams& rotation,
                           const MutableTensorView& destination);

}  // namespace structkv::cuda
