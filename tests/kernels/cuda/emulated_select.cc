#include <cstddef>
#include <cstring>
#include <random>

#include "kernels/cuda/select_cluster.h"
#include "kernels/cuda/select_global.h"
#include "tests/kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/emulated_block.h"
#include "tests/kernels/random_tensor.h"

namespace structkv::testing {
namespace {

using cuda::GlobalShared;
using cuda::SelectRow;

void RunInCluster(const SelectWay& way, const SelectRow& row, std::mt19937_64& random) {
  const int64_t tiles = cuda::SliceOf(row.tokens, 0, way.blocks).tiles;
  EmulatedCluster::RunCluster(way.blocks, way.threads,
                              static_cast<size_t>(cuda::ClusterSharedBytes(tiles)), random,
                              [&](EmulatedBlock& block, void* shared) {
                                cuda::ClusterSelector<EmulatedBlock>(block, row, shared).Run();
                              });
}

void RunInGrid(const SelectWay& way, const SelectRow& row, std::mt19937_64& random) {
  std::vector<std::max_align_t> state(
      static_cast<size_t>(cuda::GlobalStateBytes(row.tokens)) / sizeof(std::max_align_t) + 1);
  // The tiles' arrays are not zeroed on the device.
  std::memset(static_cast<void*>(state.data()), 0xCD, state.size() * sizeof(state[0]));
  std::memset(static_cast<void*>(state.data()), 0, sizeof(cuda::GlobalState));
  const auto run = [&](const auto& step) {
    EmulatedCluster::RunGrid(way.blocks, way.threads, sizeof(GlobalShared), random,
                             [&](EmulatedBlock& block, void* shared) {
                               cuda::GlobalSelector<EmulatedBlock> selector(
                                   block, row, state.data(), *static_cast<GlobalShared*>(shared));
                               step(selector);
                             });
  };
  for (int digit = 0; digit < cuda::kDigits; ++digit) {
    run([digit](auto& selector) { selector.FindDigit(digit); });
  }
  run([](auto& selector) { selector.Measure(); });
  run([](auto& selector) { selector.Write(); });
}

}  // namespace

void RunCudaSelect(const SelectWay& way, const std::vector<SelectRow>& rows) {
  thread_local std::mt19937_64 random = Random(5001);
  for (const SelectRow& row : rows) {
    if (way.cluster) {
      RunInCluster(way, row, random);
    } else {
      RunInGrid(way, row, random);
    }
  }
}

void RunCudaStatistics(const cuda::StatisticsParams& params) {
  thread_local std::mt19937_64 random = Random(5002);
  EmulatedCluster::RunGrid(
      cuda::Tiles(params.tokens), cuda::kStatisticsThreads, /*shared_bytes=*/0, random,
      [&](EmulatedBlock& block, void* /*shared*/) { cuda::TileStatistics(block, params); });
}

void RunCudaPool(const cuda::PoolParams& params) {
  for (int64_t row = 0; row < params.rows; ++row) {
    const int64_t at = row * params.row_stride;
    for (int64_t token = 0; token < params.tokens; ++token) {
      params.out[at + token] =
          cuda::PoolAt(params.in + at, params.tokens, params.smoothing, params.kernel, token);
    }
  }
}

}  // namespace structkv::testing
