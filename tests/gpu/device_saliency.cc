#include <algorithm>
#include <vector>

#include "kernels/cuda/saliency.h"
#include "kernels/saliency_checks.h"
#include "tests/gpu/device_data.h"
#include "tests/kernels/cuda/cuda_saliency.h"

namespace structkv::testing {
namespace {

using gpu::DeviceBytes;
using gpu::OrDie;

// Bytes from a view's data to the end of its last vector.
size_t Extent(const TensorView& view) {
  int64_t blocks = 1;
  int64_t tokens = view.tokens;
  if (view.paged()) {
    tokens = view.block_tokens;
    blocks = (view.tokens + view.block_tokens - 1) / view.block_tokens;
    if (view.block_table != nullptr) {
      blocks = *std::max_element(view.block_table, view.block_table + blocks) + 1;
    }
  }
  const int64_t last = (blocks - 1) * view.block_stride + (view.heads - 1) * view.head_stride +
                       (tokens - 1) * view.token_stride;
  return static_cast<size_t>(last + view.dim) * DTypeSize(view.dtype);
}

template <class T>
DeviceBytes Upload(const T* data, size_t count) {
  return {data, data == nullptr ? 0 : count * sizeof(T)};
}

}  // namespace

std::string WhyNoCudaSaliency() { return gpu::WhyNoGpu(); }

CudaSaliency RunCudaSaliency(const SaliencyParams& params, int /*blocks*/,
                             std::vector<float> centrality, float decay) {
  const auto tokens = static_cast<size_t>(params.keys.tokens);
  const auto heads = static_cast<size_t>(params.keys.heads);
  CudaSaliency out;
  out.per_head.resize(heads * tokens);
  out.saliency.resize(tokens);
  out.centrality = std::move(centrality);
  out.centrality.resize(tokens, 0.0F);

  const DeviceBytes queries(params.queries.data, Extent(params.queries));
  const DeviceBytes keys(params.keys.data, Extent(params.keys));
  const int64_t block_tokens = std::max<int64_t>(1, params.keys.block_tokens);
  const DeviceBytes table =
      Upload(params.keys.block_table,
             static_cast<size_t>((params.keys.tokens + block_tokens - 1) / block_tokens));
  const DeviceBytes lse =
      Upload(params.lse, static_cast<size_t>(params.queries.heads * params.queries.tokens));
  const DeviceBytes key_scales = Upload(params.key_scales, heads);
  const DeviceBytes per_head(out.per_head.size() * sizeof(float));
  const DeviceBytes saliency(tokens * sizeof(float));
  const DeviceBytes sums = Upload(out.centrality.data(), tokens);
  const DeviceBytes flags(sizeof(out.flags));

  cuda::SaliencyRequest request;
  request.queries = params.queries;
  request.queries.data = queries.as<void>();
  request.keys = params.keys;
  request.keys.data = keys.as<void>();
  request.keys.block_table = table.as<int32_t>();
  request.lse = lse.as<float>();
  request.scale = static_cast<float>(SaliencyScale(params));
  request.key_scales = key_scales.as<float>();
  request.per_head = per_head.as<float>();
  request.saliency = saliency.as<float>();
  request.centrality = sums.as<float>();
  request.decay = decay;
  request.flags = flags.as<cuda::SaliencyFlags>();
  const DeviceBytes workspace(static_cast<size_t>(cuda::SaliencyWorkspaceBytes(request)));
  // What is not written is NaN of every type.
  OrDie(cudaMemset(workspace.as<void>(), 0xFF, workspace.size()), "cudaMemset");
  request.workspace = workspace.as<void>();
  request.workspace_bytes = static_cast<int64_t>(workspace.size());
  OrDie(cuda::LaunchSaliency(request, nullptr), "LaunchSaliency");
  OrDie(cudaDeviceSynchronize(), "LaunchSaliency");
  per_head.CopyTo(out.per_head.data(), per_head.size());
  saliency.CopyTo(out.saliency.data(), saliency.size());
  sums.CopyTo(out.centrality.data(), sums.size());
  flags.CopyTo(&out.flags, sizeof(out.flags));
  return out;
}

}  // namespace structkv::testing
