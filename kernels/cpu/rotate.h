// Gathers kept keys and moves them to other positions in tasks, over a table of kernels.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/kernel_table.h"

namespace structkv::cpu {

// As Backend::GatherRotated. Allocates 8 bytes a pair in each task.
void GatherRotated(const KernelTable& table, const TensorView& source, const int32_t* rows,
                   bool per_head, const RotationParams& rotation,
                   const MutableTensorView& destination, ParallelFor parallel);

}  // namespace structkv::cpu
