// Gathers kept rows in tasks, over a table of kernels.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/kernel_table.h"

namespace structkv::cpu {

// As Backend::Gather.
void Gather(const KernelTable& table, const TensorView& source, const int32_t* positions,
            bool per_head, const MutableTensorView& destination, ParallelFor parallel);

}  // namespace structkv::cpu
