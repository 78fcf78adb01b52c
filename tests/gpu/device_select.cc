#include "kernels/cuda/select.h"
#include "kernels/cuda/statistics.h"
#include "tests/gpu/device_tensor.h"
#include "tests/kernels/cuda/cuda_kernels.h"

namespace structkv::testing {

using gpu::Mirror;
using gpu::OrDie;

void RunCudaSelect(const SelectWay& way, const std::vector<cuda::SelectRow>& rows) {
  Mirror mirror(Mirror::Where::kDevice);
  std::vector<cuda::SelectRow> mirrored;
  for (const cuda::SelectRow& row : rows) {
    cuda::SelectRow out = row;
    out.scores = mirror.In(row.scores, row.tokens);
    out.positions = mirror.InOut(row.positions, row.keep);
    out.sums = mirror.InOut(row.sums);
    out.parts = mirror.In(row.parts, cuda::SumsParts(row.tokens));
    mirrored.push_back(out);
  }
  int device = 0;
  OrDie(cudaGetDevice(&device), "cudaGetDevice");
  cuda::SelectLimits limits;
  OrDie(cuda::GetSelectLimits(device, &limits), "GetSelectLimits");
  // No row fits into a block that has no shared memory.
  if (!way.cluster) limits.shared_bytes = 0;
  const auto count = static_cast<int64_t>(mirrored.size());
  const gpu::DeviceBytes scratch(
      static_cast<size_t>(cuda::SelectScratchBytes(mirrored.data(), count, limits)));
  OrDie(cuda::LaunchSelect({.rows = mirrored.data(),
                            .row_count = count,
                            .scratch = scratch.as<void>(),
                            .scratch_bytes = static_cast<int64_t>(scratch.size()),
                            .limits = limits},
                           nullptr),
        "LaunchSelect");
  mirror.CopyBack();
}

void RunCudaStatistics(const cuda::StatisticsParams& params) {
  Mirror mirror(Mirror::Where::kDevice);
  cuda::StatisticsParams mirrored = params;
  mirrored.values = mirror.In(params.values, params.heads * params.tokens);
  mirrored.sum = mirror.InOut(params.sum, params.tokens);
  mirrored.centrality = mirror.InOut(params.centrality, params.tokens);
  mirrored.parts = mirror.InOut(params.parts, cuda::SumsParts(params.tokens));
  mirrored.bad = mirror.InOut(params.bad);
  OrDie(cuda::LaunchStatistics(mirrored, nullptr), "LaunchStatistics");
  mirror.CopyBack();
}

void RunCudaPool(const cuda::PoolParams& params) {
  Mirror mirror(Mirror::Where::kDevice);
  cuda::PoolParams mirrored = params;
  mirrored.in = mirror.In(params.in, params.rows * params.row_stride);
  mirrored.out = mirror.InOut(params.out, params.rows * params.row_stride);
  OrDie(cuda::LaunchPool(mirrored, nullptr), "LaunchPool");
  mirror.CopyBack();
}

}  // namespace structkv::testing
