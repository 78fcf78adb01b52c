#include <gtest/gtest.h>

#include "kernels/cuda/gather.h"
#include "tests/gpu/device_tensor.h"
#include "tests/kernels/cuda/cuda_kernels.h"

namespace structkv::testing {
namespace {

using cuda::GatherJob;
using cuda::GatherRotatedJob;
using gpu::Mirror;
using gpu::OrDie;

// A destination's bytes, blocks to their ends.
size_t Extent(const MutableTensorView& v) {
  return gpu::Extent({v.data, v.dtype, v.heads, v.tokens, v.dim, v.head_stride, v.token_stride,
                      nullptr, v.block_tokens, v.block_stride});
}

int64_t Positions(const GatherJob& job) {
  return job.destination.tokens * (job.per_head ? job.source.heads : 1);
}

GatherJob Mirrored(const GatherJob& job, Mirror& mirror) {
  GatherJob out = job;
  if (job.destination.tokens == 0) return out;
  out.source.data = mirror.In(job.source);
  if (job.source.paged()) {
    out.source.block_table = mirror.In(job.source.block_table, gpu::BlocksOf(job.source));
  }
  out.positions = mirror.In(job.positions, Positions(job));
  out.destination.data = mirror.InOut(static_cast<std::byte*>(job.destination.data),
                                      static_cast<int64_t>(Extent(job.destination)));
  return out;
}

GatherRotatedJob Mirrored(const GatherRotatedJob& job, Mirror& mirror) {
  GatherRotatedJob out = {Mirrored(job.rows, mirror), job.rotation};
  out.rotation.from = mirror.In(job.rotation.from, job.rotation.pairs);
  out.rotation.to = mirror.In(job.rotation.to, job.rotation.pairs);
  out.rotation.positions = mirror.In(job.rotation.positions, Positions(job.rows));
  return out;
}

cudaError_t Launch(const std::vector<GatherJob>& jobs) {
  return cuda::LaunchGather({jobs.data(), static_cast<int64_t>(jobs.size())}, nullptr);
}
cudaError_t Launch(const std::vector<GatherRotatedJob>& jobs) {
  return cuda::LaunchGatherRotated({jobs.data(), static_cast<int64_t>(jobs.size())}, nullptr);
}

using Bytes = std::vector<std::byte>;

template <class Job>
std::vector<Bytes> Destinations(const std::vector<Job>& jobs) {
  std::vector<Bytes> all;
  for (const Job& job : jobs) {
    const MutableTensorView& to = cuda::CopyOf(job).destination;
    const auto* data = static_cast<const std::byte*>(to.data);
    all.push_back(to.tokens == 0 ? Bytes() : Bytes(data, data + Extent(to)));
  }
  return all;
}

template <class Job>
void RunIn(Mirror::Where where, const std::vector<Job>& jobs) {
  Mirror mirror(where);
  std::vector<Job> mirrored;
  for (const Job& job : jobs) mirrored.push_back(Mirrored(job, mirror));
  OrDie(Launch(mirrored), "LaunchGather");
  mirror.CopyBack();
}

// From and to device memory, and from and to the host's.
template <class Job>
void RunInBoth(const std::vector<Job>& jobs) {
  const std::vector<Bytes> before = Destinations(jobs);
  RunIn(Mirror::Where::kPinnedHost, jobs);
  const std::vector<Bytes> by_host_memory = Destinations(jobs);
  for (size_t i = 0; i < jobs.size(); ++i) {
    std::copy(before[i].begin(), before[i].end(),
              static_cast<std::byte*>(cuda::CopyOf(jobs[i]).destination.data));
  }
  RunIn(Mirror::Where::kDevice, jobs);
  EXPECT_TRUE(Destinations(jobs) == by_host_memory) << "host memory gives other rows";
}

}  // namespace

void RunCudaGather(const std::vector<GatherJob>& jobs) { RunInBoth(jobs); }

void RunCudaGatherRotated(const std::vector<GatherRotatedJob>& jobs) { RunInBoth(jobs); }

}  // namespace structkv::testing
