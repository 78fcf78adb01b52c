#include "service/rpc/nccl_host.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "service/transport/nccl/nccl_api.h"
#include "service/transport/nccl_transport.h"
#ifdef STRUCTKV_HAVE_CUDA
#include "service/transport/nccl/cuda_device_api.h"
#endif

namespace structkv::rpc {
namespace {

absl::StatusOr<nccl::DeviceApi> DeviceApiOf(const NcclOptions& options) {
  if (options.device_api.has_value()) return *options.device_api;
#ifdef STRUCTKV_HAVE_CUDA
  return nccl::CudaDeviceApi();
#else
  return absl::FailedPreconditionError("built without CUDA");
#endif
}

absl::StatusOr<std::vector<std::unique_ptr<nccl::Hub>>> Start(const NcclOptions& options,
                                                              absl::Duration offer_limit,
                                                              const Backend& backend) {
  std::vector<std::unique_ptr<nccl::Hub>> hubs;
  if (backend.gpus().empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the backend ", std::string(backend.name()), " computes on no GPU"));
  }
  absl::StatusOr<nccl::DeviceApi> device_api = DeviceApiOf(options);
  if (!device_api.ok()) return device_api.status();
  absl::StatusOr<std::shared_ptr<const nccl::Api>> api = nccl::Api::Load(options.library);
  if (!api.ok()) return api.status();
  for (const int gpu : backend.gpus()) {
    nccl::HubOptions hub_options;
    hub_options.worker = options.worker;
    hub_options.worker.device = gpu;
    hub_options.offer_limit = offer_limit;
    absl::StatusOr<std::unique_ptr<nccl::Hub>> hub =
        nccl::Hub::Start(*api, *device_api, std::move(hub_options));
    if (!hub.ok()) {
      return absl::Status(hub.status().code(),
                          absl::StrCat("GPU ", gpu, ": ", hub.status().message()));
    }
    hubs.push_back(*std::move(hub));
  }
  return hubs;
}

}  // namespace

NcclHost::NcclHost(const NcclOptions& options, absl::Duration offer_limit, const Backend& backend,
                   std::shared_ptr<Identity> identity, PeerStreams peers)
    : backend_(backend),
      status_([&] {
        auto hubs = Start(options, offer_limit, backend);
        if (hubs.ok()) hubs_ = *std::move(hubs);
        return hubs.status();
      }()),
      service_(Hubs(), std::move(identity), std::move(peers)) {}

absl::StatusOr<std::vector<nccl::Hub*>> NcclHost::Hubs() const {
  if (!status_.ok()) return status_;
  std::vector<nccl::Hub*> hubs;
  for (const std::unique_ptr<nccl::Hub>& hub : hubs_) hubs.push_back(hub.get());
  return hubs;
}

absl::StatusOr<transport::Grant> NcclHost::Offer() const {
  absl::StatusOr<std::vector<nccl::Hub*>> hubs = Hubs();
  if (!hubs.ok()) return hubs.status();
  return transport::Grant(
      [hubs = *std::move(hubs), backend = &backend_](const auto& request, const auto& sizes) {
        return transport::GrantNccl(hubs, *backend, request, sizes);
      });
}

nccl::HubStats NcclHost::stats() const {
  nccl::HubStats all;
  for (const std::unique_ptr<nccl::Hub>& hub : hubs_) {
    const nccl::HubStats one = hub->stats();
    all.pairs += one.pairs;
    all.waiting += one.waiting;
    all.communicators.live += one.communicators.live;
    all.communicators.reclaiming += one.communicators.reclaiming;
    all.aborts += one.aborts;
  }
  return all;
}

void NcclHost::StopAttaching(const absl::Status& why) {
  for (const std::unique_ptr<nccl::Hub>& hub : hubs_) hub->StopAttaching(why);
}

void NcclHost::WaitUntilSettled(absl::Time deadline) const {
  const auto settled = [](const std::unique_ptr<nccl::Hub>& hub) { return hub->settled(); };
  while (!std::all_of(hubs_.begin(), hubs_.end(), settled) && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(5));
  }
}

void NcclHost::EndAll(const absl::Status& why) {
  for (const std::unique_ptr<nccl::Hub>& hub : hubs_) hub->EndAll(why);
}

void NcclHost::Stop() {
  for (const std::unique_ptr<nccl::Hub>& hub : hubs_) hub->Stop();
}

}  // namespace structkv::rpc
