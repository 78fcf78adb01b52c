// Our declarations of CUDA's driver interface against cuda.h.
#include "client/cpp/cuda_abi.h"

#include <cuda.h>

#include <string>
#include <type_traits>

#include "gtest/gtest.h"

namespace structkv::client::internal::cuda {
namespace {

#define STRUCTKV_NAME_OF(function) #function
#define STRUCTKV_SYMBOL(function) STRUCTKV_NAME_OF(function)

// Every argument of ours is as large as CUDA's, and of the same sort.
template <typename Ours, typename Cudas>
constexpr bool kSame =
    sizeof(Ours) == sizeof(Cudas) && std::is_pointer_v<Ours> == std::is_pointer_v<Cudas>;

template <typename Ours, typename Cudas>
struct Agree : std::false_type {};
template <typename... Ours, typename... Cudas>
struct Agree<Result (*)(Ours...), CUresult(Cudas...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(Ours) != sizeof...(Cudas)) {
      return false;
    } else {
      return (kSame<Ours, Cudas> && ...);
    }
  }();
};

#define EXPECT_FUNCTION(field, function, symbol)                               \
  EXPECT_TRUE((Agree<decltype(Functions::field), decltype(function)>::value)); \
  EXPECT_STREQ(STRUCTKV_SYMBOL(function), symbol)

TEST(CudaAbi, FunctionsAreCudas) {
  EXPECT_FUNCTION(init, cuInit, "cuInit");
  EXPECT_FUNCTION(get_error_name, cuGetErrorName, "cuGetErrorName");
  EXPECT_FUNCTION(get_error_string, cuGetErrorString, "cuGetErrorString");
  EXPECT_FUNCTION(device_get, cuDeviceGet, "cuDeviceGet");
  EXPECT_FUNCTION(device_get_uuid, cuDeviceGetUuid, "cuDeviceGetUuid_v2");
  EXPECT_FUNCTION(device_get_bus_id, cuDeviceGetPCIBusId, "cuDeviceGetPCIBusId");
  EXPECT_FUNCTION(primary_context_retain, cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  EXPECT_FUNCTION(primary_context_release, cuDevicePrimaryCtxRelease,
                  "cuDevicePrimaryCtxRelease_v2");
  EXPECT_FUNCTION(context_push, cuCtxPushCurrent, "cuCtxPushCurrent_v2");
  EXPECT_FUNCTION(context_pop, cuCtxPopCurrent, "cuCtxPopCurrent_v2");
  EXPECT_FUNCTION(memory_alloc, cuMemAlloc, "cuMemAlloc_v2");
  EXPECT_FUNCTION(memory_free, cuMemFree, "cuMemFree_v2");
  EXPECT_FUNCTION(memory_get_address_range, cuMemGetAddressRange, "cuMemGetAddressRange_v2");
  EXPECT_FUNCTION(memory_copy_async, cuMemcpyAsync, "cuMemcpyAsync");
  EXPECT_FUNCTION(pointer_get_attribute, cuPointerGetAttribute, "cuPointerGetAttribute");
  EXPECT_FUNCTION(ipc_get_memory_handle, cuIpcGetMemHandle, "cuIpcGetMemHandle");
  EXPECT_FUNCTION(ipc_get_event_handle, cuIpcGetEventHandle, "cuIpcGetEventHandle");
  EXPECT_FUNCTION(event_create, cuEventCreate, "cuEventCreate");
  EXPECT_FUNCTION(event_destroy, cuEventDestroy, "cuEventDestroy_v2");
  EXPECT_FUNCTION(event_record, cuEventRecord, "cuEventRecord");
  EXPECT_FUNCTION(stream_create, cuStreamCreate, "cuStreamCreate");
  EXPECT_FUNCTION(stream_destroy, cuStreamDestroy, "cuStreamDestroy_v2");
  EXPECT_FUNCTION(stream_wait_event, cuStreamWaitEvent, "cuStreamWaitEvent");
  EXPECT_FUNCTION(stream_synchronize, cuStreamSynchronize, "cuStreamSynchronize");
  EXPECT_FUNCTION(stream_query, cuStreamQuery, "cuStreamQuery");
}

TEST(CudaAbi, ValuesAreCudas) {
  EXPECT_EQ(sizeof(Uuid), sizeof(CUuuid));
  EXPECT_EQ(sizeof(IpcMemoryHandle), sizeof(CUipcMemHandle));
  EXPECT_EQ(sizeof(IpcEventHandle), sizeof(CUipcEventHandle));
  EXPECT_EQ(kUntimedEvent, unsigned{CU_EVENT_DISABLE_TIMING});
  EXPECT_EQ(kInterprocessEvent, unsigned{CU_EVENT_DISABLE_TIMING} | CU_EVENT_INTERPROCESS);
  EXPECT_EQ(kNonBlockingStream, unsigned{CU_STREAM_NON_BLOCKING});
  EXPECT_EQ(kMemoryTypeAttribute, static_cast<int>(CU_POINTER_ATTRIBUTE_MEMORY_TYPE));
  EXPECT_EQ(kDeviceMemory, static_cast<unsigned>(CU_MEMORYTYPE_DEVICE));
  EXPECT_EQ(kDeviceOrdinalAttribute, static_cast<int>(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL));
  EXPECT_EQ(static_cast<int>(Result::kOutOfMemory), static_cast<int>(CUDA_ERROR_OUT_OF_MEMORY));
  EXPECT_EQ(static_cast<int>(Result::kNotReady), static_cast<int>(CUDA_ERROR_NOT_READY));
}

}  // namespace
}  // namespace structkv::client::internal::cuda
