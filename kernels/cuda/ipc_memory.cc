#include "kernels/cuda/ipc_memory.h"

#include <cudaTypedefs.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_error.h"
#include "kernels/cuda/device_memory.h"

namespace structkv::cuda {
namespace {

// What another process's handle may be wrong in is not this one's fault, as Backend::Import has it.
absl::Status HandleStatus(cudaError_t error, std::string_view what) {
  absl::Status status = CudaStatus(error, what);
  if (!absl::IsInternal(status)) return status;
  return absl::FailedPreconditionError(absl::StrCat(
      status.message(),
      "; the exporter must live and still have it, in the same IPC namespace, with GPUs that both "
      "see"));
}

// The allocation in which a device's address lies.
absl::Status AllocationOf(const std::byte* data, const std::byte** begin, int64_t* bytes) {
  // The runtime has no such call, and the driver's library may be missing until a GPU is used.
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &function,
                                                             3020, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    return CudaStatus(error == cudaSuccess ? cudaErrorSymbolNotFound : error,
                      "cudaGetDriverEntryPointByVersion of cuMemGetAddressRange");
  }
  CUdeviceptr base = 0;
  size_t size = 0;
  const CUresult result = reinterpret_cast<PFN_cuMemGetAddressRange_v3020>(function)(
      &base, &size, reinterpret_cast<CUdeviceptr>(data));
  if (result != CUDA_SUCCESS) {
    return absl::FailedPreconditionError(absl::StrCat(
        "cuMemGetAddressRange: error ", static_cast<int>(result), "; there is no allocation"));
  }
  *begin = reinterpret_cast<const std::byte*>(base);
  *bytes = static_cast<int64_t>(size);
  return absl::OkStatus();
}

absl::Status CheckSize(int64_t wanted, int64_t has) {
  if (wanted >= 1 && wanted <= has) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("size_bytes is ", wanted, "; 1 to ", has,
                                                 ", what the allocation has, is allowed"));
}

// Of this process itself.
absl::StatusOr<std::byte*> OwnAddress(const ExportedMemory& exported, int gpu) {
  auto* const data = reinterpret_cast<std::byte*>(exported.base_address);
  Place place;
  if (const cudaError_t error = PlaceOf(data, &place); error != cudaSuccess) {
    return HandleStatus(error, "cudaPointerGetAttributes");
  }
  if (place.device != gpu) {
    return absl::FailedPreconditionError(
        absl::StrCat("base_address ", exported.base_address, " is not in the memory of GPU ", gpu));
  }
  const std::byte* begin = nullptr;
  int64_t bytes = 0;
  if (absl::Status status = AllocationOf(data, &begin, &bytes); !status.ok()) return status;
  if (begin != data) {
    return absl::InvalidArgumentError(absl::StrCat("base_address ", exported.base_address,
                                                   " is not the begin of its allocation, ",
                                                   reinterpret_cast<uint64_t>(begin)));
  }
  if (absl::Status fits = CheckSize(exported.bytes, bytes); !fits.ok()) return fits;
  return data;
}

}  // namespace

class IpcImports::Imported final : public ImportedMemory {
 public:
  // `imports`: where `key` is to be closed; null: the memory is this process's own.
  Imported(std::byte* data, int gpu, std::shared_ptr<IpcImports> imports, Key key)
      : data_(data), gpu_(gpu), imports_(std::move(imports)), key_(std::move(key)) {}
  ~Imported() override {
    opened_.reset();
    if (imports_ != nullptr) imports_->Close(key_);
  }

  absl::Status TakeEvent(const ExportedMemory& exported) {
    if (imports_ == nullptr) event_ = reinterpret_cast<cudaEvent_t>(exported.event_address);
    if (imports_ == nullptr || exported.event_handle.empty()) return absl::OkStatus();
    cudaIpcEventHandle_t handle;
    std::memcpy(&handle, exported.event_handle.data(), sizeof(handle));
    const cudaError_t error = cudaIpcOpenEventHandle(&event_, handle);
    if (error != cudaSuccess) return HandleStatus(error, "cudaIpcOpenEventHandle");
    opened_.reset(event_);
    return absl::OkStatus();
  }

  std::byte* data() const override { return data_; }
  int gpu() const override { return gpu_; }

  // Asks instead of waiting in CUDA, where an exporter that died would keep the thread for ever.
  absl::Status Await(std::chrono::steady_clock::time_point end) const override {
    if (event_ == nullptr) return absl::OkStatus();
    std::chrono::microseconds pause{10};
    while (true) {
      const cudaError_t error = cudaEventQuery(event_);
      if (error != cudaErrorNotReady) return CudaStatus(error, "cudaEventQuery");
      if (std::chrono::steady_clock::now() > end) {
        return absl::DeadlineExceededError(
            "the exporter's event was not reached in time: what it recorded it behind has not run");
      }
      std::this_thread::sleep_for(pause);
      pause = std::min(2 * pause, std::chrono::microseconds(500));
    }
  }

 private:
  std::byte* const data_;
  const int gpu_;
  const std::shared_ptr<IpcImports> imports_;
  const Key key_;
  cudaEvent_t event_ = nullptr;
  Event opened_;  // the same, where it was opened
};

IpcImports::IpcImports(const Devices& devices) {
  for (const std::unique_ptr<Device>& device : devices.all()) {
    gpus_.push_back({device->index(), device->uuid(), device->name()});
  }
}

absl::StatusOr<std::unique_ptr<ImportedMemory>> IpcImports::Import(const ExportedMemory& exported) {
  const absl::StatusOr<const Gpu*> gpu = Find(exported.device_uuid);
  if (!gpu.ok()) return gpu.status();
  if (const cudaError_t error = cudaSetDevice((*gpu)->index); error != cudaSuccess) {
    return CudaStatus(error, "cudaSetDevice");
  }
  const bool own = exported.exporter == ProcessId();
  const absl::StatusOr<std::byte*> data =
      own ? OwnAddress(exported, (*gpu)->index) : Open(exported, **gpu);
  if (!data.ok()) return data.status();
  auto imported =
      std::make_unique<Imported>(*data, (*gpu)->index, own ? nullptr : shared_from_this(),
                                 Key(exported.exporter, exported.base_address));
  if (absl::Status event = imported->TakeEvent(exported); !event.ok()) return event;
  return imported;
}

int64_t IpcImports::open() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int64_t>(opened_.size());
}

absl::StatusOr<const IpcImports::Gpu*> IpcImports::Find(const std::string& uuid) const {
  std::string known;
  for (const Gpu& gpu : gpus_) {
    if (gpu.uuid == uuid) return &gpu;
    absl::StrAppend(&known, known.empty() ? "" : ", ", absl::BytesToHexString(gpu.uuid), " (",
                    gpu.name, ")");
  }
  return absl::InvalidArgumentError(
      absl::StrCat("device_uuid is ", absl::BytesToHexString(uuid),
                   "; that of a GPU which computes here is allowed: ", known));
}

absl::StatusOr<std::byte*> IpcImports::Open(const ExportedMemory& exported, const Gpu& gpu) {
  const Key key(exported.exporter, exported.base_address);
  const std::lock_guard lock(mutex_);
  const auto found = opened_.find(key);
  if (found != opened_.end()) {
    Opened& opened = found->second;
    if (opened.handle != exported.memory_handle || opened.gpu != gpu.index) {
      return absl::FailedPreconditionError(
          absl::StrCat("base_address ", exported.base_address,
                       ": an older allocation of the exporter is still open there; it is freed "
                       "only after its regions are gone"));
    }
    if (absl::Status fits = CheckSize(exported.bytes, opened.bytes); !fits.ok()) return fits;
    ++opened.users;
    return opened.data;
  }
  cudaIpcMemHandle_t handle;
  std::memcpy(&handle, exported.memory_handle.data(), sizeof(handle));
  void* data = nullptr;
  const cudaError_t error = cudaIpcOpenMemHandle(&data, handle, cudaIpcMemLazyEnablePeerAccess);
  if (error != cudaSuccess) return HandleStatus(error, "cudaIpcOpenMemHandle");
  Opened opened = {.handle = exported.memory_handle,
                   .gpu = gpu.index,
                   .data = static_cast<std::byte*>(data),
                   .users = 1};
  const std::byte* begin = nullptr;
  absl::Status status = AllocationOf(opened.data, &begin, &opened.bytes);
  if (status.ok()) status = CheckSize(exported.bytes, opened.bytes);
  if (!status.ok()) {
    (void)cudaIpcCloseMemHandle(data);
    return status;
  }
  opened_.emplace(key, opened);
  return opened.data;
}

void IpcImports::Close(const Key& key) {
  const std::lock_guard lock(mutex_);
  const auto found = opened_.find(key);
  if (--found->second.users > 0) return;
  // Errors are those of a lost GPU, which the backend's next call finds.
  (void)cudaSetDevice(found->second.gpu);
  (void)cudaIpcCloseMemHandle(found->second.data);
  (void)cudaGetLastError();
  opened_.erase(found);
}

}  // namespace structkv::cuda
