#include "kernels/cuda/saliency_inputs.h"

#include <limits>

#include "kernels/cuda/tensor_runs.h"
#include "kernels/saliency_checks.h"

namespace structkv::cuda {
namespace {

// Whether the kernels can read the keys where they are, if that is the device's memory.
bool IsAligned(const TensorView& keys) {
  const auto element = static_cast<int64_t>(DTypeSize(keys.dtype));
  const int64_t unit = IsFp8(keys.dtype) ? 8 : 16;
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(keys.data)) % unit == 0 &&
         keys.head_stride * element % unit == 0 && keys.token_stride * element % unit == 0 &&
         keys.block_stride * element % unit == 0;
}

float ValueOf(uint64_t flag) {
  switch (BadKindOf(flag)) {
    case kInfinite:
      return std::numeric_limits<float>::infinity();
    case kMinusInfinite:
      return -std::numeric_limits<float>::infinity();
    default:
      return std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace

SaliencyInputs::SaliencyInputs(const SaliencyParams& params, const Place& keys_at, Parts* parts)
    : params_(params), in_place_(keys_at.on_device() && IsAligned(params.keys)) {
  const TensorView& q = params.queries;
  const TensorView& k = params.keys;
  request_.queries =
      TensorView::Dense(q.data, q.dtype, Layout::kHeadTokenDim, q.heads, q.tokens, q.dim);
  request_.keys =
      in_place_ ? k : TensorView::Dense(k.data, k.dtype, LayoutOf(k), k.heads, k.tokens, k.dim);
  request_.lse = params.lse;
  request_.key_scales = params.key_scales;
  request_.scale = static_cast<float>(SaliencyScale(params));
  request_.window_max = params.window_max;
  request_.workspace_bytes = SaliencyWorkspaceBytes(request_);
  queries_ = parts->Add<std::byte>(VectorBytes(q));
  keys_ = parts->Add<std::byte>(in_place_ ? 0 : VectorBytes(k));
  table_ = parts->Add<int32_t>(in_place_ ? TableBlocks(k) : 0);
  lse_ = parts->Add<float>(params.lse != nullptr ? q.heads * q.tokens : 0);
  key_scales_ = parts->Add<float>(params.key_scales != nullptr ? k.heads : 0);
  workspace_ = parts->Add<std::byte>(request_.workspace_bytes);
}

void SaliencyInputs::Write(const Lease& lease, Upload* upload) const {
  const TensorView& q = params_.queries;
  const TensorView& k = params_.keys;
  upload->WriteTensor(lease.At<void>(queries_), q, Layout::kHeadTokenDim);
  upload->Write(lease.At<float>(lse_), params_.lse, q.heads * q.tokens);
  upload->Write(lease.At<float>(key_scales_), params_.key_scales, k.heads);
  if (in_place_) {
    upload->Write(lease.At<int32_t>(table_), k.block_table, TableBlocks(k));
  } else {
    upload->WriteTensor(lease.At<void>(keys_), k, LayoutOf(k));
  }
}

SaliencyRequest SaliencyInputs::In(const Lease& lease) const {
  SaliencyRequest request = request_;
  request.queries.data = lease.At<void>(queries_);
  if (!in_place_) request.keys.data = lease.At<void>(keys_);
  if (request.keys.block_table != nullptr) request.keys.block_table = lease.At<int32_t>(table_);
  if (params_.lse != nullptr) request.lse = lease.At<float>(lse_);
  if (params_.key_scales != nullptr) request.key_scales = lease.At<float>(key_scales_);
  request.workspace = lease.At<void>(workspace_);
  return request;
}

absl::Status StatusOf(const SaliencyFlags& flags, const SaliencyParams& params, BadStatistic* bad) {
  const int64_t window = params.queries.tokens;
  if (flags.query != kNothingBad) {
    const int64_t row = BadRowIndex(flags.query);
    return BadQueryError(params, row / window, row % window, ValueOf(flags.query), bad);
  }
  if (flags.lse != kNothingBad) {
    const int64_t row = BadRowIndex(flags.lse);
    return BadLseError(params, row / window, row % window, ValueOf(flags.lse), bad);
  }
  if (flags.score != kNothingBad) {
    return BadScoreError({BadHead(flags.score), BadToken(flags.score), ValueOf(flags.score)}, bad);
  }
  return absl::OkStatus();
}

}  // namespace structkv::cuda
