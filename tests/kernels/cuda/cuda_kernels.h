// The CUDA kernels (kernels/cuda), run on what a program is linked with: the host's emulation of a
// GPU (emulated_*.cc), or a GPU (tests/gpu/device_*.cc). All pointers are the host's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/gather_plan.h"
#include "kernels/cuda/saliency_plan.h"
#include "kernels/cuda/select_row.h"
#include "kernels/cuda/statistics_kernel.h"

namespace structkv::testing {

// Why nothing can be run here; empty: it can.
std::string WhyNoCuda();

struct CudaSaliency {
  std::vector<float> per_head;  // [kv_heads, tokens]
  std::vector<float> saliency;  // [tokens]
  std::vector<float> centrality;
  std::vector<cuda::SumsPart> parts;  // of the saliency
  cuda::SaliencyFlags flags;
};

// Saliency of `params`, added to `centrality` (zeros where empty) with `decay`. `blocks`: how many
// blocks share the tiles, where that can be chosen.
CudaSaliency RunCudaSaliency(const SaliencyParams& params, int blocks = 2,
                             std::vector<float> centrality = {}, float decay = 0.9F);

// A way through the kernels that select: the blocks of a cluster, or of a grid where `cluster` is
// false. A GPU chooses blocks and threads by itself, and a grid for what no cluster can hold.
struct SelectWay {
  bool cluster = true;
  int blocks = 1;
  int threads = 32;

  std::string Text() const {
    return (cluster ? "cluster of " : "grid of ") + std::to_string(blocks) + " by " +
           std::to_string(threads);
  }
};
void RunCudaSelect(const SelectWay& way, const std::vector<cuda::SelectRow>& rows);

void RunCudaStatistics(const cuda::StatisticsParams& params);
void RunCudaPool(const cuda::PoolParams& params);

// Jobs whose destinations do not overlap.
void RunCudaGather(const std::vector<cuda::GatherJob>& jobs);
void RunCudaGatherRotated(const std::vector<cuda::GatherRotatedJob>& jobs);

}  // namespace structkv::testing
