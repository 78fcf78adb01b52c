#include <gtest/gtest.h>

#include <memory>
#include <random>

#include "kernels/cuda/gather_steps.h"
#include "kernels/cuda/rotate_steps.h"
#include "tests/kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/emulated_block.h"
#include "tests/kernels/random_tensor.h"

namespace structkv::testing {
namespace {

// As the launchers of gather.cu do.
template <class Launch, class Shared, class Job, class Kernel>
void RunJobs(const std::vector<Job>& jobs, const Kernel& kernel) {
  thread_local std::mt19937_64 random = Random(5003);
  for (const Job& job : jobs) ASSERT_TRUE(cuda::IsValid(job));
  const auto launch = std::make_unique<Launch>();
  const auto count = static_cast<int64_t>(jobs.size());
  for (int64_t i = 0; i < count;) {
    i += cuda::FillLaunch(jobs.data() + i, count - i, launch.get());
    EmulatedCluster::RunGrid(launch->tiles, cuda::kGatherThreads, sizeof(Shared), random,
                             [&](EmulatedBlock& block, void* shared) {
                               kernel(block, *launch, *static_cast<Shared*>(shared));
                             });
  }
}

}  // namespace

void RunCudaGather(const std::vector<cuda::GatherJob>& jobs) {
  RunJobs<cuda::CopyLaunch, cuda::RowPlaces>(
      jobs,
      [](auto& block, const auto& launch, auto& shared) { cuda::CopyTile(block, launch, shared); });
}

void RunCudaGatherRotated(const std::vector<cuda::GatherRotatedJob>& jobs) {
  RunJobs<cuda::RotateLaunch, cuda::RotateShared>(
      jobs, [](auto& block, const auto& launch, auto& shared) {
        cuda::RotateTile(block, launch, shared);
      });
}

}  // namespace structkv::testing
