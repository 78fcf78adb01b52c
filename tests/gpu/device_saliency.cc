#include <vector>

#include "kernels/cuda/saliency.h"
#include "kernels/saliency_checks.h"
#include "tests/gpu/device_tensor.h"
#include "tests/kernels/cuda/cuda_kernels.h"

namespace structkv::testing {

using gpu::Mirror;
using gpu::OrDie;

std::string WhyNoCuda() { return gpu::WhyNoGpu(); }

CudaSaliency RunCudaSaliency(const SaliencyParams& params, int /*blocks*/,
                             std::vector<float> centrality, float decay) {
  const int64_t tokens = params.keys.tokens;
  const int64_t heads = params.keys.heads;
  CudaSaliency out;
  out.per_head.resize(static_cast<size_t>(heads * tokens));
  out.saliency.resize(static_cast<size_t>(tokens));
  out.centrality = std::move(centrality);
  out.centrality.resize(static_cast<size_t>(tokens), 0.0F);
  out.parts.resize(static_cast<size_t>(cuda::SumsParts(tokens)));

  Mirror mirror(Mirror::Where::kDevice);
  cuda::SaliencyRequest request;
  request.queries = params.queries;
  request.queries.data = mirror.In(params.queries);
  request.keys = params.keys;
  request.keys.data = mirror.In(params.keys);
  if (params.keys.paged()) {
    request.keys.block_table = mirror.In(params.keys.block_table, gpu::BlocksOf(params.keys));
  }
  request.lse = mirror.In(params.lse, params.queries.heads * params.queries.tokens);
  request.scale = static_cast<float>(SaliencyScale(params));
  request.window_max = params.window_max;
  request.key_scales = mirror.In(params.key_scales, heads);
  request.per_head = mirror.InOut(out.per_head.data(), heads * tokens);
  request.saliency = mirror.InOut(out.saliency.data(), tokens);
  request.centrality = mirror.InOut(out.centrality.data(), tokens);
  request.decay = decay;
  request.parts = mirror.InOut(out.parts.data(), cuda::SumsParts(tokens));
  request.flags = mirror.InOut(&out.flags);
  const gpu::DeviceBytes workspace(static_cast<size_t>(cuda::SaliencyWorkspaceBytes(request)));
  // What is not written is NaN of every type.
  OrDie(cudaMemset(workspace.as<void>(), 0xFF, workspace.size()), "cudaMemset");
  request.workspace = workspace.as<void>();
  request.workspace_bytes = static_cast<int64_t>(workspace.size());
  OrDie(cuda::LaunchSaliency(request, nullptr), "LaunchSaliency");
  mirror.CopyBack();
  return out;
}

}  // namespace structkv::testing
