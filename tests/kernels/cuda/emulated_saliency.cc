#include "tests/kernels/cuda/emulated_saliency.h"

#include <cstdlib>
#include <cstring>
#include <random>

#include "kernels/cuda/saliency_pack.h"
#include "kernels/cuda/saliency_steps.h"
#include "kernels/cuda/saliency_weigh.h"
#include "kernels/saliency_checks.h"
#include "tests/kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/emulated_block.h"
#include "tests/kernels/random_tensor.h"

namespace structkv::testing {
namespace {

using cuda::SaliencyPlan;

// Runs `kernel` with shared memory of `floats`.
template <class Kernel>
void Run(int64_t blocks, int64_t floats, const Kernel& kernel,
         int threads = cuda::kSaliencyThreads) {
  std::mt19937_64 random = Random(5000);
  EmulatedCluster::RunGrid(
      blocks, threads, static_cast<size_t>(floats) * sizeof(float), random,
      [&](EmulatedBlock& block, void* shared) { kernel(block, static_cast<float*>(shared)); });
}

int64_t TileFloats(const SaliencyPlan& plan) { return int64_t{plan.kv_heads} * plan.tile_tokens(); }

template <class P, int kPairs>
void RunScores(const SaliencyPlan& plan, int blocks) {
  const bool store = plan.lse == nullptr;
  Run(blocks, store ? 0 : TileFloats(plan), [&](EmulatedBlock& block, float* shared) {
    if (store) {
      cuda::Scores<P, kPairs, cuda::Scored::kExps>(block, plan, nullptr);
    } else if (plan.window_max) {
      cuda::Scores<P, kPairs, cuda::Scored::kMax>(block, plan, shared);
    } else {
      cuda::Scores<P, kPairs, cuda::Scored::kSum>(block, plan, shared);
    }
  });
}

template <DType kKey, DType kQuery>
void RunScoresOf(const SaliencyPlan& plan, int blocks) {
  using P = cuda::Pieces<kKey, kQuery>;
  // Every specialisation that the launchers have, and more.
  if (kKey != DType::kF32 && plan.dim == 64) return RunScores<P, 2>(plan, blocks);
  if (kKey != DType::kF32 && plan.dim == 128) return RunScores<P, 4>(plan, blocks);
  RunScores<P, 0>(plan, blocks);
}

template <DType kKey>
void RunScoresUnder(DType query, const SaliencyPlan& plan, int blocks) {
  if (query == DType::kF16) return RunScoresOf<kKey, DType::kF16>(plan, blocks);
  if (query == DType::kBF16) return RunScoresOf<kKey, DType::kBF16>(plan, blocks);
  RunScoresOf<kKey, DType::kF32>(plan, blocks);
}

void RunScores(DType key, DType query, const SaliencyPlan& plan, int blocks) {
  switch (key) {
    case DType::kF16:
      return RunScoresOf<DType::kF16, DType::kF16>(plan, blocks);
    case DType::kBF16:
      return RunScoresOf<DType::kBF16, DType::kBF16>(plan, blocks);
    case DType::kF32:
      return RunScoresOf<DType::kF32, DType::kF32>(plan, blocks);
    case DType::kF8E4M3:
      return RunScoresUnder<DType::kF8E4M3>(query, plan, blocks);
    case DType::kF8E5M2:
      return RunScoresUnder<DType::kF8E5M2>(query, plan, blocks);
  }
}

void RunPack(DType query, const SaliencyPlan& plan) {
  Run(3, 0, [&](EmulatedBlock& block, float* /*shared*/) {
    if (query == DType::kF16) return cuda::PackQueries<DType::kF16>(block, plan);
    if (query == DType::kBF16) return cuda::PackQueries<DType::kBF16>(block, plan);
    cuda::PackQueries<DType::kF32>(block, plan);
  });
}

}  // namespace

void EmulateSaliency(const cuda::SaliencyRequest& request, int blocks) {
  SaliencyPlan plan = cuda::MakeSaliencyPlan(request);
  cuda::LayOutWorkspace(&plan, request.queries.dtype, request.workspace);
  std::memset(request.flags, 0xFF, sizeof(*request.flags));
  RunPack(request.queries.dtype, plan);
  RunScores(request.keys.dtype, request.queries.dtype, plan, blocks);
  if (request.lse != nullptr) return;
  Run(
      int64_t{plan.kv_heads} * plan.padded_rows() / cuda::kCombineRows, 2 * cuda::kCombineThreads,
      [&](EmulatedBlock& block, float* shared) {
        cuda::CombineRows(block, plan, reinterpret_cast<cuda::Floats2*>(shared));
      },
      cuda::kCombineThreads);
  Run(blocks, TileFloats(plan),
      [&](EmulatedBlock& block, float* shared) { cuda::WeighExps(block, plan, shared); });
}

std::string WhyNoCuda() { return ""; }

CudaSaliency RunCudaSaliency(const SaliencyParams& params, int blocks,
                             std::vector<float> centrality, float decay) {
  const auto tokens = static_cast<size_t>(params.keys.tokens);
  CudaSaliency out;
  out.per_head.resize(static_cast<size_t>(params.keys.heads) * tokens);
  out.saliency.resize(tokens);
  out.centrality = std::move(centrality);
  out.centrality.resize(tokens, 0.0F);
  out.parts.resize(static_cast<size_t>(cuda::SumsParts(params.keys.tokens)));
  cuda::SaliencyRequest request;
  request.queries = params.queries;
  request.keys = params.keys;
  request.lse = params.lse;
  request.scale = static_cast<float>(SaliencyScale(params));
  request.window_max = params.window_max;
  request.key_scales = params.key_scales;
  request.per_head = out.per_head.data();
  request.saliency = out.saliency.data();
  request.centrality = out.centrality.data();
  request.decay = decay;
  request.parts = out.parts.data();
  request.flags = &out.flags;
  const int64_t bytes = cuda::SaliencyWorkspaceBytes(request);
  // What is not written is NaN of every type.
  request.workspace = std::aligned_alloc(16, static_cast<size_t>((bytes + 15) / 16 * 16));
  std::memset(request.workspace, 0xFF, static_cast<size_t>(bytes));
  EmulateSaliency(request, blocks);
  std::free(request.workspace);
  return out;
}

}  // namespace structkv::testing
