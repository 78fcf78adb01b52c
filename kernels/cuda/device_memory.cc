#include "kernels/cuda/device_memory.h"

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_error.h"

namespace structkv::cuda {

absl::StatusOr<Stream> MakeStream() {
  cudaStream_t stream = nullptr;
  const cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return CudaStatus(error, "cudaStreamCreateWithFlags");
  return Stream(stream);
}

absl::StatusOr<Event> MakeEvent() {
  cudaEvent_t event = nullptr;
  const cudaError_t error =
      cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync);
  if (error != cudaSuccess) return CudaStatus(error, "cudaEventCreateWithFlags");
  return Event(event);
}

absl::StatusOr<DeviceBytes> MakeDeviceBytes(int64_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, static_cast<size_t>(bytes));
  if (error != cudaSuccess) {
    return CudaStatus(error, absl::StrCat("cudaMalloc of ", bytes, " bytes"));
  }
  return DeviceBytes(static_cast<std::byte*>(data));
}

absl::StatusOr<PinnedBytes> MakePinnedBytes(int64_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaHostAlloc(&data, static_cast<size_t>(bytes), cudaHostAllocPortable);
  if (error != cudaSuccess) {
    return CudaStatus(error, absl::StrCat("cudaHostAlloc of ", bytes, " bytes"));
  }
  return PinnedBytes(static_cast<std::byte*>(data));
}

cudaError_t PlaceOf(const void* data, Place* place) {
  *place = {};
  cudaPointerAttributes attributes;
  const cudaError_t error = cudaPointerGetAttributes(&attributes, data);
  if (error != cudaSuccess) return error;
  // Pageable memory is neither, and managed memory is the host's as well.
  if (attributes.type == cudaMemoryTypeDevice) place->device = attributes.device;
  place->pinned = attributes.type == cudaMemoryTypeHost && attributes.devicePointer == data;
  return cudaSuccess;
}

bool IsPinned(const void* data, int64_t bytes) {
  const auto* const first = static_cast<const std::byte*>(data);
  for (const std::byte* at : {first, first + bytes - 1}) {
    Place place;
    if (PlaceOf(at, &place) != cudaSuccess) {
      (void)cudaGetLastError();
      return false;
    }
    if (!place.pinned) return false;
  }
  return true;
}

absl::StatusOr<std::shared_ptr<DevicePool>> DevicePool::Make(const Sizes& sizes) {
  absl::StatusOr<DeviceBytes> memory = MakeDeviceBytes(sizes.all());
  if (!memory.ok()) return memory.status();
  return std::shared_ptr<DevicePool>(new DevicePool(*std::move(memory), sizes));
}

std::shared_ptr<std::byte> DevicePool::Share(Arena& arena, int64_t begin, int64_t bytes) {
  std::optional<Arena::Block> block = arena.Take(bytes);
  if (!block.has_value()) return nullptr;
  std::byte* const memory = bytes_.get() + begin + block->offset();
  const auto held = std::make_shared<std::pair<std::shared_ptr<DevicePool>, Arena::Block>>(
      shared_from_this(), *std::move(block));
  return {held, memory};
}

}  // namespace structkv::cuda
