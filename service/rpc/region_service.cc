#include "service/rpc/region_service.h"

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "service/rpc/status_mapping.h"
#include "service/transport/cuda_ipc.h"

namespace structkv::rpc {
namespace {

using transport::RegionRegistry;

absl::Status CheckHandle(const std::string& handle) {
  if (handle.size() == transport::kHandleBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("handle has ", handle.size(), " bytes; ",
                                                 transport::kHandleBytes, " are allowed"));
}

absl::Status CheckBytes(absl::string_view field, const std::string& bytes, size_t allowed) {
  if (bytes.size() == allowed) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("cuda_ipc.", field, " has ", bytes.size(), " bytes; ", allowed, " are allowed"));
}

absl::StatusOr<ExportedMemory> Decode(const v1::CudaIpcMemory& memory, int64_t bytes) {
  absl::Status valid = CheckBytes("memory_handle", memory.memory_handle(), kIpcHandleBytes);
  valid.Update(CheckBytes("device_uuid", memory.device_uuid(), kDeviceUuidBytes));
  valid.Update(CheckBytes("exporter_id", memory.exporter_id(), kProcessIdBytes));
  if (!memory.event_handle().empty()) {
    valid.Update(CheckBytes("event_handle", memory.event_handle(), kIpcHandleBytes));
  }
  if (!valid.ok()) return valid;
  return ExportedMemory{.memory_handle = memory.memory_handle(),
                        .bytes = bytes,
                        .device_uuid = memory.device_uuid(),
                        .exporter = memory.exporter_id(),
                        .base_address = memory.base_address(),
                        .event_address = memory.event_address(),
                        .event_handle = memory.event_handle()};
}

std::optional<absl::Duration> Lease(uint64_t millis) {
  if (millis == 0) return std::nullopt;
  return transport::LeaseOf(millis);
}

uint64_t Millis(absl::Duration duration) {
  return static_cast<uint64_t>(absl::ToInt64Milliseconds(duration));
}

v1::RegionState StateOf(const transport::RegionInfo& info) {
  if (info.broken) return v1::REGION_STATE_BROKEN;
  return info.unregistering ? v1::REGION_STATE_UNREGISTERING : v1::REGION_STATE_REGISTERED;
}

}  // namespace

template <typename Call>
grpc::ServerUnaryReactor* RegionService::Answer(grpc::CallbackServerContext* context, Call call) {
  const absl::StatusOr<std::string> tenant = identity_->TenantOf(*context);
  absl::Status status = tenant.status();
  if (status.ok()) {
    status = registry_ != nullptr
                 ? call(*registry_, *tenant)
                 : absl::UnimplementedError("this server has no regions (--region-socket)");
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

grpc::ServerUnaryReactor* RegionService::RegisterRegion(grpc::CallbackServerContext* context,
                                                        const v1::RegisterRegionRequest* request,
                                                        v1::RegisterRegionResponse* response) {
  return Answer(context, [&](RegionRegistry& registry, const std::string& tenant) {
    const transport::NewRegion wanted = {.size_bytes = request->size_bytes(),
                                         .writable = request->writable(),
                                         .lease = Lease(request->lease_millis()),
                                         .tenant = tenant};
    if (request->has_cuda_ipc() && !request->name().empty()) {
      return absl::InvalidArgumentError("name and cuda_ipc are both set; one of them is allowed");
    }
    const absl::StatusOr<transport::RegisteredRegion> region =
        request->has_cuda_ipc() ? RegisterGpuMemory(request->cuda_ipc(), wanted)
                                : registry.AddName(request->name(), wanted);
    if (!region.ok()) return region.status();
    response->set_handle(region->handle);
    response->set_lease_millis(Millis(*region->lease));
    return absl::OkStatus();
  });
}

absl::StatusOr<transport::RegisteredRegion> RegionService::RegisterGpuMemory(
    const v1::CudaIpcMemory& memory, const transport::NewRegion& wanted) {
  const auto open = [&]() -> absl::StatusOr<std::unique_ptr<transport::RegionMemory>> {
    const auto bytes = static_cast<int64_t>(wanted.size_bytes);
    absl::StatusOr<ExportedMemory> exported = Decode(memory, bytes);
    if (!exported.ok()) return exported.status();
    absl::StatusOr<std::unique_ptr<ImportedMemory>> imported = backend_.Import(*exported);
    if (!imported.ok()) return imported.status();
    return transport::GpuRegion(*std::move(imported), bytes, wanted.writable);
  };
  return registry_->AddMemory(open, wanted);
}

grpc::ServerUnaryReactor* RegionService::GetRegion(grpc::CallbackServerContext* context,
                                                   const v1::GetRegionRequest* request,
                                                   v1::GetRegionResponse* response) {
  return Answer(context, [&](RegionRegistry& registry, const std::string& tenant) {
    if (absl::Status valid = CheckHandle(request->handle()); !valid.ok()) return valid;
    const absl::StatusOr<transport::RegionInfo> info = registry.Get(request->handle(), tenant);
    if (!info.ok()) return info.status();
    response->set_state(StateOf(*info));
    response->set_size_bytes(static_cast<uint64_t>(info->size_bytes));
    response->set_writable(info->writable);
    if (info->lease_left.has_value()) response->set_lease_left_millis(Millis(*info->lease_left));
    response->set_use_count(static_cast<uint32_t>(info->uses));
    response->set_owner(info->owner);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* RegionService::RenewRegion(grpc::CallbackServerContext* context,
                                                     const v1::RenewRegionRequest* request,
                                                     v1::RenewRegionResponse* response) {
  return Answer(context, [&](RegionRegistry& registry, const std::string& tenant) {
    if (absl::Status valid = CheckHandle(request->handle()); !valid.ok()) return valid;
    const auto lease = registry.Renew(request->handle(), tenant, Lease(request->lease_millis()));
    if (!lease.ok()) return lease.status();
    response->set_lease_millis(Millis(lease->value_or(absl::ZeroDuration())));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* RegionService::UnregisterRegion(
    grpc::CallbackServerContext* context, const v1::UnregisterRegionRequest* request,
    v1::UnregisterRegionResponse* response) {
  return Answer(context, [&](RegionRegistry& registry, const std::string& tenant) {
    if (absl::Status valid = CheckHandle(request->handle()); !valid.ok()) return valid;
    const absl::StatusOr<int64_t> uses = registry.Unregister(request->handle(), tenant);
    if (!uses.ok()) return uses.status();
    response->set_use_count(static_cast<uint32_t>(*uses));
    return absl::OkStatus();
  });
}

}  // namespace structkv::rpc
