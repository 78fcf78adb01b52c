// The driver's functions of cuda.h that the client library looks up, on the fake runtime. A program
// that is linked with it is its own library of them.
#include <cuda.h>

#include <cstring>
#include <string>
#include <vector>

#include "tests/kernels/cuda/fake_state.h"

using structkv::testing::FakeWork;
using namespace structkv::testing::fake;  // NOLINT: the functions are CUDA's, and global

// What is behind a context: the primary one of each device.
struct CUctx_st {
  int device = 0;
};

namespace {

constexpr int kMostDevices = 16;
CUctx_st contexts[kMostDevices];
thread_local std::vector<int> outer_devices;  // of the contexts that were current before

// The driver's numbers are the runtime's.
CUresult Driver(cudaError_t error) { return static_cast<CUresult>(error); }

std::byte* At(CUdeviceptr data) { return reinterpret_cast<std::byte*>(data); }

void CheckSide(CUdeviceptr data, int64_t bytes) {
  if (IsDevice(At(data), 1) && !IsDevice(At(data), bytes)) {
    Die("a copy's device side is not of one allocation");
  }
}

}  // namespace

CUresult cuInit(unsigned /*flags*/) {
  int count = 0;
  return Driver(cudaGetDeviceCount(&count));
}

CUresult cuGetErrorName(CUresult error, const char** name) {
  *name = cudaGetErrorName(static_cast<cudaError_t>(error));
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString(static_cast<cudaError_t>(error));
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  const std::lock_guard lock(The().mutex);
  if (ordinal < 0 || ordinal >= The().gpus.count) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  cudaDeviceProp properties;
  const CUresult result = Driver(cudaGetDeviceProperties(&properties, device));
  std::memcpy(uuid->bytes, properties.uuid.bytes, sizeof(uuid->bytes));
  return result;
}
CUresult cuDeviceGetPCIBusId(char* id, int size, CUdevice device) {
  std::snprintf(id, static_cast<size_t>(size), "0000:%02x:00.0", device);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  const std::lock_guard lock(The().mutex);
  contexts[device].device = device;
  *context = &contexts[device];
  ++The().held.contexts;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice /*device*/) {
  const std::lock_guard lock(The().mutex);
  --The().held.contexts;
  return CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent_v2(CUcontext context) {
  outer_devices.push_back(current_device);
  current_device = context->device;
  return CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  if (outer_devices.empty()) Die("no context is current");
  *context = &contexts[current_device];
  current_device = outer_devices.back();
  outer_devices.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr* data, size_t bytes) {
  void* made = nullptr;
  const CUresult result = Driver(cudaMalloc(&made, bytes));
  *data = reinterpret_cast<CUdeviceptr>(made);
  return result;
}
CUresult cuMemFree_v2(CUdeviceptr data) { return Driver(cudaFree(At(data))); }

CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr data) {
  return AddressRange(base, bytes, data);
}

// As with CUDA, pageable memory of the host is read before it returns, and written before it
// returns.
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  bool from_device = false;
  bool to_device = false;
  {
    const std::lock_guard lock(The().mutex);
    if (const cudaError_t error = Enter(); error != cudaSuccess) return Driver(error);
    CheckSide(to, static_cast<int64_t>(size));
    CheckSide(from, static_cast<int64_t>(size));
    from_device = IsDevice(At(from), 1);
    to_device = IsDevice(At(to), 1);
  }
  if (from_device) {
    Queue(stream, FakeWork::Kind::kWithinDevice, static_cast<int64_t>(size),
          [=] { std::memcpy(At(to), At(from), size); });
  } else {
    Queue(stream, FakeWork::Kind::kToDevice, static_cast<int64_t>(size),
          [to, bytes = std::string(reinterpret_cast<const char*>(At(from)), size)] {
            std::memcpy(At(to), bytes.data(), bytes.size());
          });
  }
  return to_device ? CUDA_SUCCESS : Driver(cudaStreamSynchronize(stream));
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr data) {
  const std::lock_guard lock(The().mutex);
  if (!IsDevice(At(data), 1)) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) {
    *static_cast<CUmemorytype*>(value) = CU_MEMORYTYPE_DEVICE;
  } else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) {
    *static_cast<int*>(value) = DeviceOf(At(data));
  } else {
    Die("an attribute of an address that is not known");
  }
  return CUDA_SUCCESS;
}

CUresult cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr data) {
  cudaIpcMemHandle_t made;
  const CUresult result = Driver(cudaIpcGetMemHandle(&made, At(data)));
  std::memcpy(handle, &made, sizeof(*handle));
  return result;
}
CUresult cuIpcGetEventHandle(CUipcEventHandle* handle, CUevent event) {
  cudaIpcEventHandle_t made;
  const CUresult result = Driver(cudaIpcGetEventHandle(&made, event));
  std::memcpy(handle, &made, sizeof(*handle));
  return result;
}

CUresult cuEventCreate(CUevent* event, unsigned flags) {
  return Driver(cudaEventCreateWithFlags(event, flags));
}
CUresult cuEventDestroy_v2(CUevent event) { return Driver(cudaEventDestroy(event)); }
CUresult cuEventRecord(CUevent event, CUstream stream) {
  return Driver(cudaEventRecord(event, stream));
}

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  return Driver(cudaStreamCreateWithFlags(stream, flags));
}
CUresult cuStreamDestroy_v2(CUstream stream) { return Driver(cudaStreamDestroy(stream)); }
// What is queued from now on begins with what lies before the event.
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned /*flags*/) {
  CUstream before = nullptr;
  int64_t position = 0;
  {
    const std::lock_guard lock(The().mutex);
    before = event->stream;
    position = event->position;
  }
  if (before == nullptr || before == stream) return CUDA_SUCCESS;
  return Driver(
      Queue(stream, FakeWork::Kind::kWait, 0, [before, position] { RunUpTo(*before, position); }));
}
CUresult cuStreamSynchronize(CUstream stream) { return Driver(cudaStreamSynchronize(stream)); }
CUresult cuStreamQuery(CUstream stream) {
  if (bool (*const busy)(CUstream) = The().busy; busy != nullptr && busy(stream)) {
    return CUDA_ERROR_NOT_READY;
  }
  const std::lock_guard lock(stream->mutex);
  return stream->done == stream->queued ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
