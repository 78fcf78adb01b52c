// The CUDA saliency kernels (kernels/cuda/saliency.h), run on what a program is linked with: the
// host's emulation of a GPU (emulated_saliency.cc), or a GPU (tests/gpu/device_saliency.cc).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/saliency_plan.h"

namespace structkv::testing {

struct CudaSaliency {
  std::vector<float> per_head;  // [kv_heads, tokens]
  std::vector<float> saliency;  // [tokens]
  std::vector<float> centrality;
  cuda::SaliencyFlags flags;
};

// Why nothing can be run here; empty: it can.
std::string WhyNoCudaSaliency();

// Saliency of `params`, added to `centrality` (zeros where empty) with `decay`. `blocks`: how many
// blocks share the tiles, where that can be chosen.
CudaSaliency RunCudaSaliency(const SaliencyParams& params, int blocks = 2,
                             std::vector<float> centrality = {}, float decay = 0.9F);

}  // namespace structkv::testing
