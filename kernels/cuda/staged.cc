#include "kernels/cuda/staged.h"

#include <utility>

#include "kernels/cuda/device.h"
#include "kernels/cuda/devices.h"
#include "kernels/cuda/staging.h"
#include "kernels/cuda/tensor_runs.h"

namespace structkv::cuda {
namespace {

// Each is a copy that is queued by a thread which has other work to do.
constexpr int kMostRuns = 256;

// Whether the runs of the view's vectors, of the host's memory, are few, worth a copy each, and
// pinned.
bool CanBeCopiedAsTheyLie(const TensorView& view) {
  TensorRuns runs(view, LayoutOf(view));
  int count = 0;
  for (Run run = runs.Next(); run.data != nullptr; run = runs.Next()) {
    if (++count > kMostRuns || run.bytes < kDirectBytes || !IsPinned(run.data, run.bytes))
      return false;
  }
  return true;
}

}  // namespace

Staged::~Staged() {
  // What was queued still reads the caller's memory, and writes the block.
  const cudaError_t error = device_->Finished(*this) ? cudaEventSynchronize(copied_.get())
                                                     : cudaStreamSynchronize(device_->copies());
  (void)device_->Check(error, "cudaEventSynchronize");
  device_->GiveBack(this);
}

absl::Status Staged::Copy(int64_t offset, const void* from, int64_t bytes) {
  return device_->Check(cudaMemcpyAsync(data_ + offset, from, static_cast<size_t>(bytes),
                                        cudaMemcpyHostToDevice, device_->copies()),
                        "cudaMemcpyAsync");
}

absl::Status Staged::Finish() {
  absl::Status status =
      device_->Check(cudaEventRecord(copied_.get(), device_->copies()), "cudaEventRecord");
  if (status.ok()) device_->Finish(this);
  return status;
}

std::unique_ptr<StagedLayer> StageKeys(Devices& devices, const SaliencyParams& params, int gpu) {
  const TensorView& keys = params.keys;
  const absl::StatusOr<Place> place = devices.PlaceOf(keys.data);
  if (!place.ok() || place->on_device() || !place->pinned || !CanBeCopiedAsTheyLie(keys)) {
    return nullptr;
  }
  std::unique_ptr<Staged> staged = devices.TryStage(VectorBytes(keys), gpu);
  if (staged == nullptr) return nullptr;
  // An error that matters is met again by the call.
  TensorRuns runs(keys, LayoutOf(keys));
  int64_t offset = 0;
  for (Run run = runs.Next(); run.data != nullptr; run = runs.Next()) {
    if (!staged->Copy(offset, run.data, run.bytes).ok()) return nullptr;
    offset += run.bytes;
  }
  return staged->Finish().ok() ? std::move(staged) : nullptr;
}

}  // namespace structkv::cuda
