// The GPUs of this process, and which of them a call goes to.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/device.h"

namespace structkv::cuda {

// Thread-safe.
class Devices {
 public:
  // All that are visible to the process and new enough. NOT_FOUND, with what CUDA says, where there
  // are none; otherwise as Device::Open.
  static absl::StatusOr<std::unique_ptr<Devices>> Open(const DeviceOptions& options);

  // A lease of `bytes(device)` bytes (kernels/cuda/device.h) on the device with the most free
  // memory, of those that can hold the call at all.
  absl::StatusOr<Lease> Acquire(absl::FunctionRef<int64_t(const Device&)> bytes);
  absl::StatusOr<Lease> Acquire(int64_t bytes) {
    return Acquire([bytes](const Device&) { return bytes; });
  }
  // On the device of that CUDA index, whose memory the call's tensors lie in; -1: on any.
  // INVALID_ARGUMENT where it is none of these.
  absl::StatusOr<Lease> AcquireOn(int index, absl::FunctionRef<int64_t(const Device&)> bytes);
  absl::StatusOr<Lease> AcquireOn(int index, int64_t bytes) {
    return AcquireOn(index, [bytes](const Device&) { return bytes; });
  }
  // As Device::TryStage, on the device of that index or, with -1, on that with the most free
  // memory.
  std::unique_ptr<Staged> TryStage(int64_t bytes, int index);
  // Where a tensor lies. UNAVAILABLE where the backend is lost.
  absl::StatusOr<Place> PlaceOf(const void* data);
  // Whether the one of that index, or with -1 any of them, can ever hold so much.
  bool CanHold(absl::FunctionRef<int64_t(const Device&)> bytes, int index) const;
  bool CanHold(int64_t bytes, int index = -1) const {
    return CanHold([bytes](const Device&) { return bytes; }, index);
  }

  const std::vector<std::unique_ptr<Device>>& all() const { return all_; }
  // The one of that index; null where it is none of these.
  Device* Find(int index) const;
  // UNAVAILABLE once any of them is lost.
  absl::Status Health() const { return loss_.status(); }

 private:
  Devices() = default;
  // The device with the most free memory, of those that can hold so much at all.
  Device& MostFree(absl::FunctionRef<int64_t(const Device&)> bytes) const;

  Loss loss_;
  std::vector<std::unique_ptr<Device>> all_;
};

}  // namespace structkv::cuda
