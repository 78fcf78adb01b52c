#include "client/cpp/nccl_device.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "client/cpp/driver_device_api.h"

namespace structkv::client {

absl::StatusOr<std::shared_ptr<NcclGpu>> NcclGpu::Open(const NcclOptions& options) {
  auto api = nccl::Api::Load(options.nccl_library);
  if (!api.ok()) return api.status();
  const auto device_api = internal::DriverDeviceApi(options.cuda_library, options.gpu);
  if (!device_api.ok()) return device_api.status();
  nccl::WorkerOptions worker;
  worker.device = options.gpu;
  auto device = internal::NcclDevice::Start(*std::move(api), *device_api, std::move(worker),
                                            nccl::HostId(), options.attach_limit);
  if (!device.ok()) return device.status();
  return std::make_shared<NcclGpu>(*std::move(device));
}

NcclGpu::NcclGpu(std::unique_ptr<internal::NcclDevice> device) : device_(std::move(device)) {}

NcclGpu::~NcclGpu() = default;

namespace internal {

absl::StatusOr<std::unique_ptr<NcclDevice>> NcclDevice::Start(std::shared_ptr<const nccl::Api> api,
                                                              const nccl::DeviceApi& device_api,
                                                              nccl::WorkerOptions options,
                                                              std::string host,
                                                              absl::Duration attach_limit) {
  std::unique_ptr<NcclDevice> device(new NcclDevice());
  absl::StatusOr<std::string> bus = device_api.bus_id(options.device);
  if (!bus.ok()) return bus.status();
  device->identity_.nccl_version = api->version();
  device->identity_.host_id = std::move(host);
  device->identity_.bus_id = *std::move(bus);
  device->identity_.group_bytes = options.group_bytes;
  device->attach_limit_ = attach_limit;
  auto worker = nccl::Worker::Start(std::move(api), device_api, std::move(options));
  if (!worker.ok()) return worker.status();
  device->worker_ = *std::move(worker);
  return device;
}

absl::StatusOr<std::shared_ptr<NcclPair>> NcclPair::Attach(std::shared_ptr<grpc::Channel> channel,
                                                           std::shared_ptr<NcclGpu> gpu,
                                                           const std::string& tenant,
                                                           absl::Time deadline) {
  const NcclDevice& device = gpu->device();
  auto stream = NcclStream::Attach(std::move(channel), device.worker(), device.identity(),
                                   std::min(device.attach_limit(), deadline - absl::Now()), tenant);
  if (absl::IsDeadlineExceeded(stream.status())) {
    return absl::UnavailableError(stream.status().message());
  }
  if (!stream.ok()) return stream.status();
  return std::shared_ptr<NcclPair>(new NcclPair(std::move(gpu), *std::move(stream)));
}

NcclPair::NcclPair(std::shared_ptr<NcclGpu> gpu, std::unique_ptr<NcclStream> stream)
    : gpu_(std::move(gpu)), stream_(std::move(stream)), thread_([calls = calls_, over = over_] {
        while (!*over) {
          for (nccl::Inbox::Job& call : calls->Take(absl::Seconds(1))) call();
        }
      }) {}

NcclPair::~NcclPair() {
  stream_.reset();
  calls_->Post([over = over_] { *over = true; });
  if (thread_.get_id() == std::this_thread::get_id()) {
    thread_.detach();  // by what it calls
  } else {
    thread_.join();
  }
}

}  // namespace internal
}  // namespace structkv::client
