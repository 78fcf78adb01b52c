#include "client/cpp/gpu_memory.h"

#include <random>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/imported_memory.h"

namespace structkv::client::internal {
namespace {

constexpr size_t kBlock = size_t{2} << 20;

cuda::DevicePointer Address(const void* data) {
  return reinterpret_cast<cuda::DevicePointer>(data);
}

// This process as other ones know it: not by ProcessId(), which is for itself alone. It is made
// when CUDA is in use, which a fork does not survive.
const std::string& ExporterId() {
  static const auto* const id = [] {
    std::random_device random;
    auto* bytes = new std::string();
    while (bytes->size() < kProcessIdBytes) bytes->push_back(static_cast<char>(random()));
    return bytes;
  }();
  return *id;
}

}  // namespace

absl::StatusOr<std::shared_ptr<GpuMemory>> GpuMemory::Make(const GpuAllocation& adopted,
                                                           RegionOptions* options) {
  auto device = CudaDevice::Open(options->cuda_library, options->gpu);
  if (!device.ok()) return device.status();
  std::shared_ptr<GpuMemory> memory(new GpuMemory(*std::move(device)));
  const CudaDevice::Scope scope(*memory->device_);
  absl::Status status;
  if (adopted.data != nullptr) {
    status = memory->Adopt(adopted, options);
  } else {
    // What is too large stays so when it is rounded.
    const size_t blocks = (options->size_bytes - 1) / kBlock;
    if (blocks < SIZE_MAX / kBlock) options->size_bytes = (blocks + 1) * kBlock;
    status = memory->Allocate(options->size_bytes);
  }
  if (!status.ok()) return status;
  for (const auto& [event, flags] : {std::pair(&memory->event_, cuda::kInterprocessEvent),
                                     std::pair(&memory->mark_, cuda::kUntimedEvent)}) {
    status = memory->device_->driver().ToStatus(memory->device_->call().event_create(event, flags),
                                                "cuEventCreate");
    if (!status.ok()) return status;
  }
  return memory;
}

absl::Status GpuMemory::Allocate(size_t bytes) {
  cuda::DevicePointer data = 0;
  absl::Status status = device_->driver().ToStatus(
      device_->call().memory_alloc(&data, bytes),
      absl::StrCat("a region of ", bytes, " bytes on GPU ", device_->ordinal(), ": cuMemAlloc"));
  if (!status.ok()) return status;
  data_ = reinterpret_cast<std::byte*>(data);
  allocated_ = true;
  return absl::OkStatus();
}

absl::Status GpuMemory::Adopt(const GpuAllocation& adopted, RegionOptions* options) {
  const auto invalid = [](const auto&... parts) {
    return absl::InvalidArgumentError(absl::StrCat("GpuAllocation.data ", parts...));
  };
  const cuda::Functions& call = device_->call();
  int ordinal = -1;
  if (call.pointer_get_attribute(&ordinal, cuda::kDeviceOrdinalAttribute, Address(adopted.data)) !=
          cuda::Result::kSuccess ||
      !device_->IsOnGpu(static_cast<const std::byte*>(adopted.data))) {
    return invalid("is not in a GPU's memory");
  }
  if (ordinal != device_->ordinal()) {
    return invalid("is in the memory of GPU ", ordinal, "; RegionOptions.gpu is ",
                   device_->ordinal());
  }
  cuda::DevicePointer base = 0;
  size_t bytes = 0;
  absl::Status status = device_->driver().ToStatus(
      call.memory_get_address_range(&base, &bytes, Address(adopted.data)), "cuMemGetAddressRange");
  if (!status.ok()) return status;
  if (base != Address(adopted.data)) {
    return invalid("lies ", Address(adopted.data) - base, " bytes behind the begin of its ",
                   "allocation, which is shared as a whole; give that");
  }
  options->size_bytes = bytes;
  data_ = static_cast<std::byte*>(adopted.data);
  owner_ = adopted.owner;
  return absl::OkStatus();
}

GpuMemory::~GpuMemory() {
  const CudaDevice::Scope scope(*device_);
  for (cuda::Event* const event : {event_, mark_}) {
    if (event != nullptr) device_->call().event_destroy(event);
  }
  if (allocated_) device_->call().memory_free(Address(data_));
}

absl::Status GpuMemory::Record(void* stream) const {
  absl::MutexLock lock(&record_mutex_);
  absl::Status status = device_->Record(mark_, static_cast<cuda::Stream*>(stream));
  return status.ok() ? RecordBehind(mark_) : status;
}

absl::Status GpuMemory::RecordAlso(const GpuMemory& other) const {
  absl::MutexLock lock(&record_mutex_);
  return RecordBehind(other.event_);
}

// By way of a stream of its own, which waits for one after the other: a record would replace the
// one before, and streams of the caller's that wait for each other may wait for ever.
absl::Status GpuMemory::RecordBehind(cuda::Event* event) const {
  absl::Status status = device_->Wait(event);
  return status.ok() ? device_->Record(event_, device_->stream()) : status;
}

absl::StatusOr<v1::CudaIpcMemory> GpuMemory::Export(bool own_process) const {
  const CudaDevice::Scope scope(*device_);
  cuda::IpcMemoryHandle memory;
  cuda::IpcEventHandle event;
  absl::Status status =
      device_->driver().ToStatus(device_->call().ipc_get_memory_handle(&memory, Address(data_)),
                                 "cuIpcGetMemHandle (memory of cudaMalloc alone can be shared)");
  if (!status.ok()) return status;
  status = device_->driver().ToStatus(device_->call().ipc_get_event_handle(&event, event_),
                                      "cuIpcGetEventHandle");
  if (!status.ok()) return status;
  v1::CudaIpcMemory exported;
  exported.set_memory_handle(memory.bytes, sizeof(memory.bytes));
  exported.set_event_handle(event.bytes, sizeof(event.bytes));
  exported.set_device_uuid(device_->uuid());
  exported.set_exporter_id(own_process ? ProcessId() : ExporterId());
  exported.set_base_address(Address(data_));
  if (own_process) exported.set_event_address(Address(event_));
  return exported;
}

absl::StatusOr<std::unique_ptr<Registration>> GpuMemory::Register(const RegionServer& server,
                                                                  const RegionOptions& options,
                                                                  absl::Time deadline) {
  const absl::StatusOr<v1::CudaIpcMemory> exported = Export(server.own_process);
  if (!exported.ok()) return exported.status();
  return RegisterGpu(server, options, *exported, shared_from_this(), deadline);
}

absl::StatusOr<std::shared_ptr<RegionMemory>> MakeGpuMemory(RegionOptions* options) {
  return GpuMemory::Make({}, options);
}

absl::StatusOr<std::shared_ptr<RegionMemory>> AdoptGpuMemory(const GpuAllocation& allocation,
                                                             RegionOptions* options) {
  if (allocation.data == nullptr) {
    return absl::InvalidArgumentError("GpuAllocation.data is null; it must be an address");
  }
  return GpuMemory::Make(allocation, options);
}

}  // namespace structkv::client::internal
