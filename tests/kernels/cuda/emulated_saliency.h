// LaunchSaliency (kernels/cuda/saliency.h) on the host: the same kernels in the same order.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/saliency_plan.h"

namespace structkv::testing {

struct EmulatedSaliency {
  std::vector<float> per_head;  // [kv_heads, tokens]
  std::vector<float> saliency;  // [tokens]
  std::vector<float> centrality;
  cuda::SaliencyFlags flags;
};

// Saliency of `params`, added to `centrality` (zeros where empty) with `decay`. `blocks`: how many
// blocks share the tiles.
EmulatedSaliency EmulateSaliency(const SaliencyParams& params, int blocks = 2,
                                 std::vector<float> centrality = {}, float decay = 0.9F);

}  // namespace structkv::testing
