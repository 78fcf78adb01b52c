#include "kernels/cuda/saliency_call.h"

#include <algorithm>
#include <limits>

#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/saliency.h"
#include "kernels/cuda/staging.h"
#include "kernels/cuda/tensor_runs.h"
#include "kernels/saliency_checks.h"

namespace structkv::cuda {
namespace {

// `count` KV heads from `first` on, with their query heads.
SaliencyParams HeadsOf(const SaliencyParams& params, int64_t first, int64_t count) {
  const int64_t group = params.queries.heads / params.keys.heads;
  SaliencyParams some = params;
  const auto drop = [first](TensorView* view, int64_t heads) {
    const int64_t elements = first * heads * view->head_stride;
    view->data = static_cast<const std::byte*>(view->data) +
                 elements * static_cast<int64_t>(DTypeSize(view->dtype));
  };
  drop(&some.keys, 1);
  drop(&some.queries, group);
  some.keys.heads = count;
  some.queries.heads = count * group;
  if (params.lse != nullptr) some.lse += first * group * params.queries.tokens;
  if (params.key_scales != nullptr) some.key_scales += first;
  return some;
}

// Whether the kernels can read the keys where they are, if that is the device's memory.
bool IsAligned(const TensorView& keys) {
  const auto element = static_cast<int64_t>(DTypeSize(keys.dtype));
  const int64_t unit = IsFp8(keys.dtype) ? 8 : 16;
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(keys.data)) % unit == 0 &&
         keys.head_stride * element % unit == 0 && keys.token_stride * element % unit == 0 &&
         keys.block_stride * element % unit == 0;
}

// Where a call's tensors lie in its lease. Keys are packed, so that they are aligned as the kernels
// want them whatever the caller's are, unless the kernels can read them where they are.
struct Places {
  // `keys_at`: where the keys lie.
  Places(const SaliencyParams& params, const Place& keys_at)
      : in_place(keys_at.on_device() && IsAligned(params.keys)) {
    const TensorView& q = params.queries;
    const TensorView& k = params.keys;
    const auto bytes = [](const TensorView& v) {
      return v.heads * v.tokens * v.dim * static_cast<int64_t>(DTypeSize(v.dtype));
    };
    const Layout layout = LayoutOf(k);
    request.queries =
        TensorView::Dense(q.data, q.dtype, Layout::kHeadTokenDim, q.heads, q.tokens, q.dim);
    request.keys =
        in_place ? k : TensorView::Dense(k.data, k.dtype, layout, k.heads, k.tokens, k.dim);
    request.lse = params.lse;
    request.key_scales = params.key_scales;
    request.scale = static_cast<float>(SaliencyScale(params));
    request.window_max = params.window_max;
    request.workspace_bytes = SaliencyWorkspaceBytes(request);
    queries = parts.Add<std::byte>(bytes(q));
    keys = parts.Add<std::byte>(in_place ? 0 : bytes(k));
    table = parts.Add<int32_t>(in_place ? TableBlocks(k) : 0);
    lse = parts.Add<float>(params.lse != nullptr ? q.heads * q.tokens : 0);
    key_scales = parts.Add<float>(params.key_scales != nullptr ? k.heads : 0);
    flags = parts.Add<SaliencyFlags>(1);
    out = parts.Add<float>(k.heads * k.tokens);
    workspace = parts.Add<std::byte>(request.workspace_bytes);
  }

  const bool in_place;
  SaliencyRequest request;  // its pointers are still the caller's
  Parts parts;
  int64_t queries, keys, table, lse, key_scales, flags, out, workspace;
};

absl::Status RunHeads(Devices& devices, const SaliencyParams& params, const Place& keys_at,
                      float* out, SaliencyFlags* flags) {
  const Places places(params, keys_at);
  absl::StatusOr<Lease> lease = devices.AcquireOn(keys_at.device, places.parts.bytes());
  if (!lease.ok()) return lease.status();
  SaliencyRequest request = places.request;
  request.queries.data = lease->At<void>(places.queries);
  if (!places.in_place) request.keys.data = lease->At<void>(places.keys);
  if (request.keys.block_table != nullptr) {
    request.keys.block_table = lease->At<int32_t>(places.table);
  }
  request.lse = params.lse != nullptr ? lease->At<float>(places.lse) : nullptr;
  request.key_scales = params.key_scales != nullptr ? lease->At<float>(places.key_scales) : nullptr;
  request.per_head = lease->At<float>(places.out);
  request.flags = lease->At<SaliencyFlags>(places.flags);
  request.workspace = lease->At<void>(places.workspace);

  Upload upload(*lease);
  upload.WriteTensor(lease->At<void>(places.queries), params.queries, Layout::kHeadTokenDim);
  upload.Write(lease->At<float>(places.lse), params.lse,
               params.queries.heads * params.queries.tokens);
  upload.Write(lease->At<float>(places.key_scales), params.key_scales, params.keys.heads);
  if (places.in_place) {
    upload.Write(lease->At<int32_t>(places.table), params.keys.block_table,
                 TableBlocks(params.keys));
  } else {
    upload.WriteTensor(lease->At<void>(places.keys), params.keys, LayoutOf(params.keys));
  }
  absl::Status status = upload.Flush();
  if (status.ok()) {
    status = lease->device().Check(LaunchSaliency(request, lease->stream()), "LaunchSaliency");
  }
  if (status.ok()) status = Download(*lease, request.flags, sizeof(*flags), flags);
  const int64_t bytes =
      params.keys.heads * params.keys.tokens * static_cast<int64_t>(sizeof(float));
  return status.ok() ? Download(*lease, request.per_head, bytes, out) : status;
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

// Adds what was found in a group of heads, of which the first is `first` and its first query head
// has row `first_row`.
void AddFlags(const SaliencyFlags& some, int first, int64_t first_row, SaliencyFlags* all) {
  if (some.score != kNothingBad) {
    all->score = std::min(all->score, BadScore(BadToken(some.score), first + BadHead(some.score),
                                               BadKindOf(some.score)));
  }
  const auto add = [first_row](uint64_t flag, uint64_t* least) {
    if (flag == kNothingBad) return;
    *least = std::min(*least, BadRow(first_row + BadRowIndex(flag), BadKindOf(flag)));
  };
  add(some.query, &all->query);
  add(some.lse, &all->lse);
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

}  // namespace

absl::Status Saliency(Devices& devices, const SaliencyParams& params, float* out,
                      BadStatistic* bad) {
  const absl::StatusOr<Place> keys_at = devices.PlaceOf(params.keys.data);
  if (!keys_at.ok()) return keys_at.status();
  const int64_t heads = params.keys.heads;
  const int64_t group_rows = params.queries.heads / heads * params.queries.tokens;
  int64_t step = std::min<int64_t>(heads, kMaxKvHeads);
  while (step > 1 && !devices.CanHold(Places(HeadsOf(params, 0, step), *keys_at).parts.bytes(),
                                      keys_at->device)) {
    step = (step + 1) / 2;
  }
  SaliencyFlags flags = {kNothingBad, kNothingBad, kNothingBad};
  for (int64_t first = 0; first < heads; first += step) {
    const int64_t count = std::min(step, heads - first);
    SaliencyFlags found;
    if (absl::Status status = RunHeads(devices, HeadsOf(params, first, count), *keys_at,
                                       out + first * params.keys.tokens, &found);
        !status.ok()) {
      return status;
    }
    AddFlags(found, static_cast<int>(first), first * group_rows, &flags);
  }
  return StatusOf(flags, params, bad);
}

}  // namespace structkv::cuda
