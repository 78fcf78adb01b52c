// Kept rows by the GPU, from and to the host's memory or its own.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/devices.h"
#include "kernels/rotation.h"
#include "kernels/tensor.h"

namespace structkv::cuda {

// As Backend::Gather and GatherRotated. Of a source in pinned or device memory the kernels read the
// rows where they are; of any other the host packs them on their way to the device, so that the bus
// carries nothing that is not kept. A destination in device memory is written by the kernels.
// Errors are those of Devices::AcquireOn and Device::Check; INVALID_ARGUMENT where both lie in
// device memory, of two GPUs.
absl::Status Gather(Devices& devices, const TensorView& source, const int32_t* positions,
                    bool per_head, const MutableTensorView& destination);
absl::Status GatherRotated(Devices& devices, const TensorView& source, const int32_t* rows,
                           bool per_head, const RotationParams& rotation,
                           const MutableTensorView& destination);

// As Backend::Zero, of memory of the GPU with that CUDA index.
absl::Status Zero(Devices& devices, int index, void* to, int64_t bytes);
// As Backend::Fill, likewise.
absl::Status Fill(Devices& devices, int index, void* to, int64_t bytes, FillRun fill);

}  // namespace structkv::cuda
