// The few types, values and functions of CUDA's driver interface that are used here, so that hosts
// without its header build too. tests/client/cuda_abi_test.cc compares them with cuda.h where there
// is one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace structkv::client::internal::cuda {

// What `CUcontext`, `CUstream` and `CUevent` point to; the runtime's cudaStream_t and cudaEvent_t
// are the same.
struct Context;
struct Stream;
struct Event;

using Device = int;              // CUdevice
using DevicePointer = uint64_t;  // CUdeviceptr

// `CUresult`: any value of it may come.
enum class Result : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotReady = 600,
};

struct Uuid {
  char bytes[16] = {};
};
struct IpcMemoryHandle {
  char bytes[64] = {};
};
struct IpcEventHandle {
  char bytes[64] = {};
};

// CU_EVENT_DISABLE_TIMING, that | CU_EVENT_INTERPROCESS, CU_STREAM_NON_BLOCKING.
inline constexpr unsigned kUntimedEvent = 2;
inline constexpr unsigned kInterprocessEvent = kUntimedEvent | 4;
inline constexpr unsigned kNonBlockingStream = 1;
// CU_POINTER_ATTRIBUTE_MEMORY_TYPE with CU_MEMORYTYPE_DEVICE, and .._DEVICE_ORDINAL.
inline constexpr int kMemoryTypeAttribute = 2;
inline constexpr unsigned kDeviceMemory = 2;
inline constexpr int kDeviceOrdinalAttribute = 9;

// The functions that are used, as cuda.h declares them.
struct Functions {
  Result (*init)(unsigned flags);
  Result (*get_error_name)(Result error, const char** name);
  Result (*get_error_string)(Result error, const char** text);
  Result (*device_get)(Device* device, int ordinal);
  Result (*device_get_uuid)(Uuid* uuid, Device device);
  Result (*device_get_bus_id)(char* id, int size, Device device);
  Result (*primary_context_retain)(Context** context, Device device);
  Result (*primary_context_release)(Device device);
  Result (*context_push)(Context* context);
  Result (*context_pop)(Context** context);
  Result (*memory_alloc)(DevicePointer* data, size_t bytes);
  Result (*memory_free)(DevicePointer data);
  Result (*memory_get_address_range)(DevicePointer* base, size_t* bytes, DevicePointer data);
  Result (*memory_copy_async)(DevicePointer to, DevicePointer from, size_t bytes, Stream* stream);
  Result (*pointer_get_attribute)(void* value, int attribute, DevicePointer data);
  Result (*ipc_get_memory_handle)(IpcMemoryHandle* handle, DevicePointer data);
  Result (*ipc_get_event_handle)(IpcEventHandle* handle, Event* event);
  Result (*event_create)(Event** event, unsigned flags);
  Result (*event_destroy)(Event* event);
  Result (*event_record)(Event* event, Stream* stream);
  Result (*stream_create)(Stream** stream, unsigned flags);
  Result (*stream_destroy)(Stream* stream);
  Result (*stream_wait_event)(Stream* stream, Event* event, unsigned flags);
  Result (*stream_synchronize)(Stream* stream);
  Result (*stream_query)(Stream* stream);
};

}  // namespace structkv::client::internal::cuda
