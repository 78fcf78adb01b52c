#include "client/cpp/cuda_driver.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "service/transport/nccl/symbols.h"

namespace structkv::client::internal {
namespace {

std::string NameOf(const std::string& library) {
  return library.empty() ? "the program itself" : library;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const CudaDriver>> CudaDriver::Load(const std::string& library) {
  // Never closed: the driver has threads of its own.
  void* const handle = dlopen(library.empty() ? nullptr : library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat("no CUDA driver: ", dlerror()));
  }
  std::shared_ptr<CudaDriver> driver(new CudaDriver());
  cuda::Functions& call = driver->functions_;
  Symbols symbols(handle);
  symbols.Find("cuInit", &call.init);
  symbols.Find("cuGetErrorName", &call.get_error_name);
  symbols.Find("cuGetErrorString", &call.get_error_string);
  symbols.Find("cuDeviceGet", &call.device_get);
  symbols.Find("cuDeviceGetUuid_v2", &call.device_get_uuid);
  symbols.Find("cuDeviceGetPCIBusId", &call.device_get_bus_id);
  symbols.Find("cuDevicePrimaryCtxRetain", &call.primary_context_retain);
  symbols.Find("cuDevicePrimaryCtxRelease_v2", &call.primary_context_release);
  symbols.Find("cuCtxPushCurrent_v2", &call.context_push);
  symbols.Find("cuCtxPopCurrent_v2", &call.context_pop);
  symbols.Find("cuMemAlloc_v2", &call.memory_alloc);
  symbols.Find("cuMemFree_v2", &call.memory_free);
  symbols.Find("cuMemGetAddressRange_v2", &call.memory_get_address_range);
  symbols.Find("cuMemcpyAsync", &call.memory_copy_async);
  symbols.Find("cuPointerGetAttribute", &call.pointer_get_attribute);
  symbols.Find("cuIpcGetMemHandle", &call.ipc_get_memory_handle);
  symbols.Find("cuIpcGetEventHandle", &call.ipc_get_event_handle);
  symbols.Find("cuEventCreate", &call.event_create);
  symbols.Find("cuEventDestroy_v2", &call.event_destroy);
  symbols.Find("cuEventRecord", &call.event_record);
  symbols.Find("cuStreamCreate", &call.stream_create);
  symbols.Find("cuStreamDestroy_v2", &call.stream_destroy);
  symbols.Find("cuStreamWaitEvent", &call.stream_wait_event);
  symbols.Find("cuStreamSynchronize", &call.stream_synchronize);
  symbols.Find("cuStreamQuery", &call.stream_query);
  if (symbols.missing() != nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("no CUDA driver: ", NameOf(library), " has no ", symbols.missing()));
  }
  if (absl::Status status = driver->ToStatus(call.init(0), "cuInit"); !status.ok()) return status;
  return driver;
}

absl::Status CudaDriver::ToStatus(cuda::Result result, absl::string_view what) const {
  if (result == cuda::Result::kSuccess) return absl::OkStatus();
  const char* name = nullptr;
  const char* text = nullptr;
  functions_.get_error_name(result, &name);
  functions_.get_error_string(result, &text);
  const std::string message = absl::StrCat(
      what, ": ", name != nullptr ? name : absl::StrCat("error ", static_cast<int>(result)),
      text != nullptr ? " (" : "", text != nullptr ? text : "", text != nullptr ? ")" : "");
  return result == cuda::Result::kOutOfMemory ? absl::ResourceExhaustedError(message)
                                              : absl::FailedPreconditionError(message);
}

absl::StatusOr<std::shared_ptr<CudaDevice>> CudaDevice::Open(const std::string& library,
                                                             int ordinal) {
  auto driver = CudaDriver::Load(library);
  if (!driver.ok()) return driver.status();
  std::shared_ptr<CudaDevice> device(new CudaDevice(*std::move(driver), ordinal));
  const cuda::Functions& call = device->call();
  const auto check = [&](cuda::Result result, const char* what) {
    return device->driver().ToStatus(result, absl::StrCat("GPU ", ordinal, ": ", what));
  };
  absl::Status status = check(call.device_get(&device->device_, ordinal), "cuDeviceGet");
  if (!status.ok()) return status;
  cuda::Uuid uuid;
  status = check(call.device_get_uuid(&uuid, device->device_), "cuDeviceGetUuid");
  if (!status.ok()) return status;
  device->uuid_.assign(uuid.bytes, sizeof(uuid.bytes));
  char bus_id[32] = {};
  status =
      check(call.device_get_bus_id(bus_id, sizeof(bus_id), device->device_), "cuDeviceGetPCIBusId");
  if (!status.ok()) return status;
  device->bus_id_ = bus_id;
  status = check(call.primary_context_retain(&device->context_, device->device_),
                 "cuDevicePrimaryCtxRetain");
  if (!status.ok()) return status;
  const Scope scope(*device);
  status = check(call.stream_create(&device->stream_, cuda::kNonBlockingStream), "cuStreamCreate");
  if (!status.ok()) return status;
  return device;
}

CudaDevice::~CudaDevice() {
  if (context_ == nullptr) return;
  if (stream_ != nullptr) {
    const Scope scope(*this);
    call().stream_destroy(stream_);
  }
  call().primary_context_release(device_);
}

absl::Status CudaDevice::Wait(cuda::Event* event) const {
  const Scope scope(*this);
  return driver_->ToStatus(call().stream_wait_event(stream_, event, 0), "cuStreamWaitEvent");
}

absl::Status CudaDevice::Record(cuda::Event* event, cuda::Stream* stream) const {
  const Scope scope(*this);
  return driver_->ToStatus(call().event_record(event, stream), "cuEventRecord");
}

absl::Status CudaDevice::Copy(std::byte* to, const std::byte* from, size_t bytes,
                              cuda::Event* after) const {
  if (bytes == 0) return absl::OkStatus();
  const Scope scope(*this);
  absl::Status status = after != nullptr ? Wait(after) : absl::OkStatus();
  if (!status.ok()) return status;
  status = driver_->ToStatus(
      call().memory_copy_async(reinterpret_cast<cuda::DevicePointer>(to),
                               reinterpret_cast<cuda::DevicePointer>(from), bytes, stream_),
      "cuMemcpyAsync");
  if (!status.ok()) return status;
  return driver_->ToStatus(call().stream_synchronize(stream_), "cuStreamSynchronize");
}

bool CudaDevice::IsOnGpu(const std::byte* data) const {
  const Scope scope(*this);
  unsigned type = 0;
  const cuda::Result found = call().pointer_get_attribute(
      &type, cuda::kMemoryTypeAttribute, reinterpret_cast<cuda::DevicePointer>(data));
  return found == cuda::Result::kSuccess && type == cuda::kDeviceMemory;
}

}  // namespace structkv::client::internal
