// Keys that are gathered and moved to other positions, in double precision.
#pragma once

#include "kernels/backend.h"

namespace structkv::reference {

// As Backend::GatherRotated.
void GatherRotated(const TensorView& source, const int32_t* rows, bool per_head,
                   const RotationParams& rotation, const MutableTensorView& destination);

}  // namespace structkv::reference
