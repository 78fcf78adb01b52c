#include "kernels/cuda/devices.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_error.h"

namespace structkv::cuda {

absl::StatusOr<std::unique_ptr<Devices>> Devices::Open(const DeviceOptions& options) {
  int count = 0;
  // Without a driver this fails, and leaves the count as it is.
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    return absl::NotFoundError(
        absl::StrCat("no CUDA device: ", CudaStatus(error, "cudaGetDeviceCount").message()));
  }
  absl::Status why = absl::NotFoundError("no CUDA device");
  std::unique_ptr<Devices> devices(new Devices());
  for (int index = 0; index < count; ++index) {
    absl::StatusOr<std::unique_ptr<Device>> device = Device::Open(index, options, &devices->loss_);
    if (device.ok()) {
      devices->all_.push_back(*std::move(device));
    } else if (absl::IsFailedPrecondition(device.status())) {
      why = device.status();
    } else {
      return device.status();
    }
  }
  if (devices->all_.empty()) return why;
  return devices;
}

Device& Devices::MostFree(absl::FunctionRef<int64_t(const Device&)> bytes) const {
  Device* best = all_.front().get();
  int64_t most = -1;
  for (const std::unique_ptr<Device>& device : all_) {
    const int64_t free = device->free_bytes();
    if (free > most && device->CanHold(bytes(*device))) {
      best = device.get();
      most = free;
    }
  }
  return *best;
}

absl::StatusOr<Lease> Devices::Acquire(absl::FunctionRef<int64_t(const Device&)> bytes) {
  Device& best = MostFree(bytes);
  return best.Acquire(bytes(best));
}

std::unique_ptr<Staged> Devices::TryStage(int64_t bytes, int index) {
  Device* const device = Find(index);
  if (device != nullptr) return device->TryStage(bytes);
  return MostFree([bytes](const Device&) { return bytes; }).TryStage(bytes);
}

absl::StatusOr<Lease> Devices::AcquireOn(int index,
                                         absl::FunctionRef<int64_t(const Device&)> bytes) {
  if (index < 0) return Acquire(bytes);
  if (Device* const device = Find(index)) return device->Acquire(bytes(*device));
  return absl::InvalidArgumentError(absl::StrCat("a tensor lies in the memory of GPU ", index,
                                                 ", which is not among those that compute"));
}

Device* Devices::Find(int index) const {
  for (const std::unique_ptr<Device>& device : all_) {
    if (device->index() == index) return device.get();
  }
  return nullptr;
}

absl::StatusOr<Place> Devices::PlaceOf(const void* data) {
  if (absl::Status status = Health(); !status.ok()) return status;
  Place place;
  absl::Status status =
      all_.front()->Check(cuda::PlaceOf(data, &place), "cudaPointerGetAttributes");
  if (!status.ok()) return status;
  return place;
}

bool Devices::CanHold(absl::FunctionRef<int64_t(const Device&)> bytes, int index) const {
  return std::any_of(all_.begin(), all_.end(), [bytes, index](const auto& device) {
    return (index < 0 || device->index() == index) && device->CanHold(bytes(*device));
  });
}

}  // namespace structkv::cuda
