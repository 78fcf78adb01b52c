#include "kernels/cuda/saliency_call.h"

#include <algorithm>
#include <memory>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/downloads.h"
#include "kernels/cuda/saliency.h"
#include "kernels/cuda/saliency_inputs.h"
#include "kernels/cuda/staging.h"

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

// A group of heads' call in its lease.
struct HeadsCall {
  HeadsCall(const SaliencyParams& params, const Place& keys_at)
      : inputs(params, keys_at, &parts),
        flags(parts.Add<SaliencyFlags>(1)),
        out(parts.Add<float>(params.keys.heads * params.keys.tokens)) {}

  Parts parts;
  const SaliencyInputs inputs;
  const int64_t flags, out;
};

absl::Status RunHeads(Devices& devices, const SaliencyParams& params, const Place& keys_at,
                      float* out, SaliencyFlags* flags) {
  const HeadsCall call(params, keys_at);
  absl::StatusOr<Lease> lease = devices.AcquireOn(keys_at.device, call.parts.bytes());
  if (!lease.ok()) return lease.status();
  SaliencyRequest request = call.inputs.In(*lease);
  request.per_head = lease->At<float>(call.out);
  request.flags = lease->At<SaliencyFlags>(call.flags);
  Upload upload(*lease);
  call.inputs.Write(*lease, &upload);
  absl::Status status = upload.Flush();
  if (status.ok()) {
    status = lease->device().Check(LaunchSaliency(request, lease->stream()), "LaunchSaliency");
  }
  if (!status.ok()) return status;
  Downloads downloads(*lease);
  downloads.Read(request.flags, sizeof(*flags), flags);
  downloads.Read(request.per_head,
                 params.keys.heads * params.keys.tokens * static_cast<int64_t>(sizeof(float)), out);
  return downloads.Finish();
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

}  // namespace

absl::Status CheckRoom(const Devices& devices, const SaliencyParams& params, bool keys_on_device) {
  const HeadsCall call(HeadsOf(params, 0, 1), {.device = keys_on_device ? 0 : -1});
  if (devices.CanHold(call.parts.bytes())) return absl::OkStatus();
  int64_t most = 0;
  for (const std::unique_ptr<Device>& device : devices.all()) {
    most = std::max(most, device->pool_bytes());
  }
  return absl::ResourceExhaustedError(
      absl::StrCat("one KV head of a layer needs ", call.parts.bytes(),
                   " bytes of a GPU's memory; all that calls have of it is ", most));
}

absl::Status Saliency(Devices& devices, const SaliencyParams& params, float* out,
                      BadStatistic* bad) {
  const absl::StatusOr<Place> keys_at = devices.PlaceOf(params.keys.data);
  if (!keys_at.ok()) return keys_at.status();
  const int64_t heads = params.keys.heads;
  const int64_t group_rows = params.queries.heads / heads * params.queries.tokens;
  int64_t step = std::min<int64_t>(heads, kMaxKvHeads);
  while (step > 1 && !devices.CanHold(HeadsCall(HeadsOf(params, 0, step), *keys_at).parts.bytes(),
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
