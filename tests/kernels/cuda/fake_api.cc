// The functions of cuda_runtime_api.h, on the fake runtime.
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <iterator>

#include "tests/kernels/cuda/fake_state.h"

using structkv::testing::FakeWork;
using namespace structkv::testing::fake;  // NOLINT: the functions are CUDA's, and global

namespace {

// The beginning of every call that takes memory; under the mutex.
cudaError_t EnterAllocation() {
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  return Failed(The().allocation_failure.Next());
}

cudaError_t Allocate(void** data, size_t size, bool on_device) {
  Runtime& r = The();
  const std::lock_guard lock(r.mutex);
  if (const cudaError_t error = EnterAllocation(); error != cudaSuccess) return error;
  const auto bytes = static_cast<int64_t>(size);
  if (on_device && bytes > r.gpus.memory_bytes - TakenBytes(current_device)) {
    return Failed(cudaErrorMemoryAllocation);
  }
  Allocation made = {.bytes = bytes, .device = current_device};
  if (on_device) {
    made.file = MakeShared(bytes, Protection());
    *data = made.file.data;
  } else {
    *data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*data == MAP_FAILED) Die("mmap");
  }
  Allocations& all = on_device ? r.device_memory : r.pinned_memory;
  all.emplace(static_cast<std::byte*>(*data), made);
  (on_device ? r.held.device_bytes : r.held.pinned_bytes) += bytes;
  return cudaSuccess;
}

cudaError_t Release(Allocations* all, void* data, int64_t* held) {
  const std::lock_guard lock(The().mutex);
  const auto found = all->find(static_cast<std::byte*>(data));
  if (found == all->end()) Die("what is freed was not allocated");
  if (all == &The().pinned_memory) {
    munmap(data, static_cast<size_t>(found->second.bytes));
  } else {
    if (found->second.file.imported()) Die("what is freed belongs to another process");
    if (Drop(found->second.file)) ++The().freed_while_open;
  }
  *held -= found->second.bytes;
  all->erase(found);
  return The().sticky;
}

}  // namespace

cudaError_t cudaGetDeviceCount(int* count) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  if (The().count_error != cudaSuccess) return Failed(The().count_error);
  *count = The().gpus.count;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  if (device < 0 || device >= The().gpus.count) return Failed(cudaErrorInvalidDevice);
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "Fake GPU");
  properties->major = The().gpus.major;
  std::memset(properties->uuid.bytes, 0xF0 + device, sizeof(properties->uuid.bytes));
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  switch (attribute) {
    case cudaDevAttrClusterLaunch:
      *value = The().gpus.major >= 9 ? 1 : 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 << 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    default:
      Die("an attribute that is not known");
  }
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  *total = static_cast<size_t>(The().gpus.memory_bytes);
  *free = static_cast<size_t>(The().gpus.memory_bytes - TakenBytes(current_device));
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t size) {
  return Allocate(data, size, /*on_device=*/true);
}
cudaError_t cudaHostAlloc(void** data, size_t size, unsigned /*flags*/) {
  return Allocate(data, size, /*on_device=*/false);
}
cudaError_t cudaFree(void* data) {
  return Release(&The().device_memory, data, &The().held.device_bytes);
}
cudaError_t cudaFreeHost(void* data) {
  return Release(&The().pinned_memory, data, &The().held.pinned_bytes);
}

cudaError_t cudaHostRegister(void* data, size_t size, unsigned /*flags*/) {
  Runtime& r = The();
  const std::lock_guard lock(r.mutex);
  if (const cudaError_t error = EnterAllocation(); error != cudaSuccess) return error;
  const auto bytes = static_cast<int64_t>(size);
  auto* const begin = static_cast<std::byte*>(data);
  const auto next = r.registered_memory.lower_bound(begin);
  const bool overlaps = (next != r.registered_memory.end() && next->first < begin + bytes) ||
                        (next != r.registered_memory.begin() &&
                         std::prev(next)->first + std::prev(next)->second.bytes > begin);
  if (overlaps) return Failed(cudaErrorHostMemoryAlreadyRegistered);
  r.registered_memory.emplace(begin, Allocation{.bytes = bytes});
  return cudaSuccess;
}

// The memory is still there: whoever unmaps it before has a device read what is not its.
cudaError_t cudaHostUnregister(void* data) {
  Runtime& r = The();
  const std::lock_guard lock(r.mutex);
  const auto found = r.registered_memory.find(static_cast<std::byte*>(data));
  if (found == r.registered_memory.end()) Die("what is unregistered was not registered");
  unsigned char resident = 0;
  if (mincore(data, 1, &resident) != 0) Die("what is unregistered is not mapped any more");
  r.registered_memory.erase(found);
  return r.sticky;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned /*flags*/) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  *stream = new CUstream_st();
  (*stream)->device = current_device;
  ++The().held.streams;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  RunUpTo(*stream, stream->queued);
  delete stream;
  const std::lock_guard lock(The().mutex);
  --The().held.streams;
  return The().sticky;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  RunUpTo(*stream, stream->queued);
  const std::lock_guard lock(The().mutex);
  return Enter();
}

// What runs when somebody waits runs when somebody asks, too.
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

// For what the event has been recorded after by now, whatever becomes of the event.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned /*flags*/) {
  {
    const std::lock_guard lock(The().mutex);
    if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  }
  if (event->shared != nullptr || event->stream == nullptr) {
    return Queue(stream, FakeWork::Kind::kWait, 0, [event] { (void)cudaEventSynchronize(event); });
  }
  return Queue(stream, FakeWork::Kind::kWait, 0,
               [of = event->stream, position = event->position] { RunUpTo(*of, position); });
}

cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  std::snprintf(id, static_cast<size_t>(length), "0000:%02x:00.0", device);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const auto bytes = static_cast<int64_t>(size);
  auto what = FakeWork::Kind::kToDevice;
  {
    const std::lock_guard lock(The().mutex);
    if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
    const bool anywhere = kind == cudaMemcpyDefault;
    if (!anywhere && kind != cudaMemcpyHostToDevice && kind != cudaMemcpyDeviceToHost) {
      Die("a copy of another kind");
    }
    const auto check = [&](const void* side, bool on_device) {
      if (on_device && !IsDevice(side, bytes)) Die("a copy's device side is not of one allocation");
      if (!on_device && !IsPinned(side, bytes)) Die("a copy's host side is not pinned");
    };
    const bool to_device = anywhere ? IsDevice(to, 1) : kind == cudaMemcpyHostToDevice;
    const bool from_device = anywhere ? IsDevice(from, 1) : kind == cudaMemcpyDeviceToHost;
    check(to, to_device);
    check(from, from_device);
    what = !to_device    ? FakeWork::Kind::kFromDevice
           : from_device ? FakeWork::Kind::kWithinDevice
                         : FakeWork::Kind::kToDevice;
  }
  return Queue(stream, what, bytes, [=] { std::memcpy(to, from, size); });
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  {
    const std::lock_guard lock(The().mutex);
    if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
    if (!IsDevice(to, static_cast<int64_t>(size))) Die("what is set is not of one allocation");
  }
  return Queue(stream, FakeWork::Kind::kSet, static_cast<int64_t>(size),
               [=] { std::memset(to, value, size); });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* data) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  *attributes = {};
  if (IsDevice(data, 1)) {
    attributes->type = cudaMemoryTypeDevice;
    attributes->device = DeviceOf(data);
  } else if (IsPinned(data, 1)) {
    attributes->type = cudaMemoryTypeHost;
  }
  if (attributes->type != cudaMemoryTypeUnregistered) {
    attributes->devicePointer = const_cast<void*>(data);
  }
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const std::lock_guard lock(The().mutex);
  const cudaError_t error = last_error;
  last_error = The().sticky;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    default:
      return "cudaErrorOther";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    default:
      return "another error";
  }
}
