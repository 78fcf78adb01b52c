// The saliency kernels' own code on emulated blocks.
#pragma once

#include "kernels/cuda/saliency_plan.h"

namespace structkv::testing {

// As LaunchSaliency (kernels/cuda/saliency.h), at once. `blocks` share the tiles.
void EmulateSaliency(const cuda::SaliencyRequest& request, int blocks);

}  // namespace structkv::testing
