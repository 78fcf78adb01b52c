#include "client/cpp/driver_device_api.h"

#include <map>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "client/cpp/cuda_driver.h"

namespace structkv::client::internal {
namespace {

// The table's functions have no state of their own. Never destroyed: NCCL's threads use them.
struct Opened {
  absl::Mutex mutex;
  std::shared_ptr<const CudaDriver> driver ABSL_GUARDED_BY(mutex);
  std::map<int, std::shared_ptr<CudaDevice>> devices ABSL_GUARDED_BY(mutex);
};

Opened& All() {
  static auto* const all = new Opened();
  return *all;
}

absl::StatusOr<std::shared_ptr<CudaDevice>> Find(int ordinal) {
  absl::MutexLock lock(&All().mutex);
  const auto found = All().devices.find(ordinal);
  if (found != All().devices.end()) return found->second;
  return absl::InternalError(absl::StrCat("GPU ", ordinal, " was not opened"));
}

const CudaDriver& Driver() {
  absl::MutexLock lock(&All().mutex);
  return *All().driver;
}

cuda::Stream* Cuda(nccl::Stream* stream) { return reinterpret_cast<cuda::Stream*>(stream); }

}  // namespace

absl::StatusOr<nccl::DeviceApi> DriverDeviceApi(const std::string& library, int ordinal) {
  auto opened = CudaDevice::Open(library, ordinal);
  if (!opened.ok()) return opened.status();
  {
    absl::MutexLock lock(&All().mutex);
    if (All().driver == nullptr) All().driver = (*opened)->shared_driver();
    All().devices.emplace(ordinal, *std::move(opened));
  }
  nccl::DeviceApi api;
  api.set_device = [](int device) {
    const auto found = Find(device);
    return found.ok() ? (*found)->MakeCurrent() : found.status();
  };
  api.create_stream = []() -> absl::StatusOr<nccl::Stream*> {
    cuda::Stream* stream = nullptr;
    const absl::Status status = Driver().ToStatus(
        Driver().call().stream_create(&stream, cuda::kNonBlockingStream), "cuStreamCreate");
    if (!status.ok()) return status;
    return reinterpret_cast<nccl::Stream*>(stream);
  };
  api.destroy_stream = [](nccl::Stream* stream) { Driver().call().stream_destroy(Cuda(stream)); };
  api.wait_event = [](nccl::Stream* stream, void* event) {
    return Driver().ToStatus(
        Driver().call().stream_wait_event(Cuda(stream), static_cast<cuda::Event*>(event), 0),
        "cuStreamWaitEvent");
  };
  api.stream_done = [](nccl::Stream* stream) -> absl::StatusOr<bool> {
    const cuda::Result result = Driver().call().stream_query(Cuda(stream));
    if (result == cuda::Result::kNotReady) return false;
    if (absl::Status status = Driver().ToStatus(result, "cuStreamQuery"); !status.ok()) {
      return status;
    }
    return true;
  };
  api.bus_id = [](int device) -> absl::StatusOr<std::string> {
    const auto found = Find(device);
    if (!found.ok()) return found.status();
    return (*found)->bus_id();
  };
  return api;
}

}  // namespace structkv::client::internal
