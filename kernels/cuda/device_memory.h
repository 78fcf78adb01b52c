// What the CUDA runtime hands out, each given back by its destructor, which ignores errors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/cuda/arena.h"

namespace structkv::cuda {

template <auto kGiveBack>
struct GivesBack {
  template <class T>
  void operator()(T* held) const noexcept {
    (void)kGiveBack(held);
  }
};
using Stream = std::unique_ptr<CUstream_st, GivesBack<&cudaStreamDestroy>>;
using Event = std::unique_ptr<CUevent_st, GivesBack<&cudaEventDestroy>>;
using DeviceBytes = std::unique_ptr<std::byte, GivesBack<&cudaFree>>;
using PinnedBytes = std::unique_ptr<std::byte, GivesBack<&cudaFreeHost>>;

// All of these are made on the thread's current device. Errors as of CudaStatus.

// Ordered after no other stream.
absl::StatusOr<Stream> MakeStream();
// Takes no time; a thread that waits for it sleeps.
absl::StatusOr<Event> MakeEvent();
absl::StatusOr<DeviceBytes> MakeDeviceBytes(int64_t bytes);
// Host memory that every device can copy from and to while the host goes on.
absl::StatusOr<PinnedBytes> MakePinnedBytes(int64_t bytes);

// Where a byte lies.
struct Place {
  int device = -1;      // of the GPU whose memory it is; -1: the host's
  bool pinned = false;  // host memory that a kernel can use at the address that the host uses

  bool on_device() const { return device >= 0; }
};
// On an error the byte is not to be touched.
cudaError_t PlaceOf(const void* data, Place* place);

// Whether the bytes, of the host's memory, are pinned, so that they can be copied while the host
// goes on, and read by a kernel at the address that the host uses.
bool IsPinned(const void* data, int64_t bytes);

// One allocation of the current device, made once, and who has which part of it. The last
// `apart_bytes` of it are set apart: what is taken of them for long leaves calls their room.
// Thread-safe.
class DevicePool {
 public:
  static absl::StatusOr<std::unique_ptr<DevicePool>> Make(int64_t bytes, int64_t apart_bytes = 0);

  std::optional<Arena::Block> Take(int64_t bytes) { return arena_.Take(bytes); }
  std::byte* At(const Arena::Block& block) const { return bytes_.get() + block.offset(); }
  int64_t bytes() const { return arena_.bytes(); }
  int64_t free_bytes() const { return arena_.free_bytes(); }

  // The same of what is set apart.
  Arena& apart() { return apart_; }
  const Arena& apart() const { return apart_; }
  std::byte* ApartAt(const Arena::Block& block) const {
    return bytes_.get() + arena_.bytes() + block.offset();
  }

 private:
  DevicePool(DeviceBytes memory, int64_t bytes, int64_t apart_bytes)
      : bytes_(std::move(memory)), arena_(bytes - apart_bytes), apart_(apart_bytes) {}

  const DeviceBytes bytes_;
  Arena arena_;
  Arena apart_;
};

}  // namespace structkv::cuda
