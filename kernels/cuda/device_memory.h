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

// One allocation of the current device, made once, and who has which part of it. What is taken for
// long has arenas of its own, so that calls have their room. Thread-safe.
class DevicePool : public std::enable_shared_from_this<DevicePool> {
 public:
  struct Sizes {
    int64_t calls = 0;
    int64_t resident = 0;
    int64_t apart = 0;
    int64_t all() const { return calls + resident + apart; }
  };
  static absl::StatusOr<std::shared_ptr<DevicePool>> Make(const Sizes& sizes);

  std::optional<Arena::Block> Take(int64_t bytes) { return calls_.Take(bytes); }
  std::byte* At(const Arena::Block& block) const { return bytes_.get() + block.offset(); }
  const Arena& calls() const { return calls_; }

  // Of one of the other two; keeps the pool. Null where not so much is free.
  std::shared_ptr<std::byte> TakeResident(int64_t bytes) {
    return Share(resident_, sizes_.calls, bytes);
  }
  std::shared_ptr<std::byte> TakeApart(int64_t bytes) {
    return Share(apart_, sizes_.calls + sizes_.resident, bytes);
  }
  const Arena& resident() const { return resident_; }
  const Arena& apart() const { return apart_; }

 private:
  DevicePool(DeviceBytes memory, const Sizes& sizes)
      : bytes_(std::move(memory)),
        sizes_(sizes),
        calls_(sizes.calls),
        resident_(sizes.resident),
        apart_(sizes.apart) {}

  // `begin`: where the arena begins.
  std::shared_ptr<std::byte> Share(Arena& arena, int64_t begin, int64_t bytes);

  const DeviceBytes bytes_;
  const Sizes sizes_;  // each a multiple of 256
  Arena calls_;
  Arena resident_;
  Arena apart_;
};

}  // namespace structkv::cuda
