// A prompt's vectors in a GPU's memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels/cuda/devices.h"
#include "kernels/resident_vectors.h"

namespace structkv::cuda {

// The device outlives them.
class DeviceVectors final : public ResidentVectors {
 public:
  // On the device of that index or, with -1, on that with the most room for such; null where there
  // is none now.
  static std::unique_ptr<DeviceVectors> TryMake(const Devices& devices, int index, int64_t count,
                                                int64_t tokens);

  int gpu() const override { return device_.index(); }
  absl::Status Add(const ResidentPlace& to, const float* values, ParallelFor parallel) override;
  absl::Status Fold(int64_t to, float decay, absl::Span<const int64_t> from,
                    ParallelFor parallel) override;
  absl::Status Select(int64_t vector, const structkv::SelectParams& params,
                      int32_t* positions) const override;
  absl::Status Read(int64_t vector, float* values) const override;
  void Drop(int64_t /*vector*/) override {}

  // [tokens], device.
  float* At(int64_t vector) const {
    return reinterpret_cast<float*>(memory_.get() + vector * vector_bytes_);
  }

 private:
  DeviceVectors(Device& device, std::shared_ptr<std::byte> memory, int64_t tokens,
                int64_t vector_bytes)
      : device_(device), memory_(std::move(memory)), tokens_(tokens), vector_bytes_(vector_bytes) {}

  Device& device_;
  const std::shared_ptr<std::byte> memory_;
  const int64_t tokens_;
  const int64_t vector_bytes_;
};

}  // namespace structkv::cuda
