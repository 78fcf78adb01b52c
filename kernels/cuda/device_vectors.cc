#include "kernels/cuda/device_vectors.h"

#include <utility>

#include "kernels/cuda/downloads.h"
#include "kernels/cuda/staging.h"
#include "kernels/cuda/vector_launches.h"

namespace structkv::cuda {
namespace {

constexpr int64_t kFloat = sizeof(float);

}  // namespace

std::unique_ptr<DeviceVectors> DeviceVectors::TryMake(const Devices& devices, int index,
                                                      int64_t count, int64_t tokens) {
  Parts one;
  one.Add<float>(tokens);
  Device* best = nullptr;
  for (const std::unique_ptr<Device>& device : devices.all()) {
    if (index >= 0 && device->index() != index) continue;
    if (best == nullptr || device->free_resident_bytes() > best->free_resident_bytes()) {
      best = device.get();
    }
  }
  if (best == nullptr) return nullptr;
  std::shared_ptr<std::byte> memory = best->TryResident(count * one.bytes());
  if (memory == nullptr) return nullptr;
  return std::unique_ptr<DeviceVectors>(
      new DeviceVectors(*best, std::move(memory), tokens, one.bytes()));
}

absl::Status DeviceVectors::Add(const ResidentPlace& to, const float* values,
                                ParallelFor /*parallel*/) {
  Parts parts;
  const int64_t added = parts.Add<float>(to.decay.has_value() ? tokens_ : 0);
  absl::StatusOr<Lease> lease = device_.Acquire(parts.bytes());
  if (!lease.ok()) return lease.status();
  float* const from = to.decay.has_value() ? lease->At<float>(added) : At(to.vector);
  Upload upload(*lease);
  upload.Write(from, values, tokens_);
  absl::Status status = upload.Flush();
  if (status.ok() && to.decay.has_value()) {
    status = RunAccumulate(*lease, *to.decay, from, At(to.vector), tokens_);
  }
  return status.ok() ? WaitFor(*lease) : status;
}

absl::Status DeviceVectors::Fold(int64_t to, float decay, absl::Span<const int64_t> from,
                                 ParallelFor /*parallel*/) {
  absl::StatusOr<Lease> lease = device_.Acquire(0);
  if (!lease.ok()) return lease.status();
  for (const int64_t each : from) {
    absl::Status status = RunAccumulate(*lease, decay, At(each), At(to), tokens_);
    if (!status.ok()) return status;
  }
  return WaitFor(*lease);
}

absl::Status DeviceVectors::Select(int64_t vector, const structkv::SelectParams& params,
                                   int32_t* positions) const {
  if (params.keep == 0) return absl::OkStatus();
  Parts parts;
  const int64_t kept = parts.Add<int32_t>(params.keep);
  SelectRow row = {
      .scores = At(vector), .tokens = params.tokens, .window = params.window, .keep = params.keep};
  absl::StatusOr<Lease> lease = device_.Acquire(parts.bytes() + SelectScratch(device_, &row, 1));
  if (!lease.ok()) return lease.status();
  row.positions = lease->At<int32_t>(kept);
  return SelectToHost(*lease, row, lease->At<void>(parts.bytes()), positions);
}

absl::Status DeviceVectors::Read(int64_t vector, float* values) const {
  absl::StatusOr<Lease> lease = device_.Acquire(0);
  if (!lease.ok()) return lease.status();
  return Download(*lease, At(vector), tokens_ * kFloat, values);
}

}  // namespace structkv::cuda
