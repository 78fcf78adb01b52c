// The `Regions` service: decodes, asks the registry, maps the status.
#pragma once

#include <memory>
#include <utility>

#include "kernels/backend.h"
#include "service/rpc/identity.h"
#include "service/transport/region_registry.h"
#include "structkv/v1/region.grpc.pb.h"

namespace structkv::rpc {

class RegionService final : public v1::Regions::CallbackService {
 public:
  // Null: the server has no regions, and every call is UNIMPLEMENTED. `backend`, which outlives the
  // object, opens memory of GPUs.
  RegionService(std::shared_ptr<transport::RegionRegistry> registry, const Backend* backend,
                std::shared_ptr<Identity> identity)
      : registry_(std::move(registry)), backend_(*backend), identity_(std::move(identity)) {}

  grpc::ServerUnaryReactor* RegisterRegion(grpc::CallbackServerContext* context,
                                           const v1::RegisterRegionRequest* request,
                                           v1::RegisterRegionResponse* response) override;
  grpc::ServerUnaryReactor* GetRegion(grpc::CallbackServerContext* context,
                                      const v1::GetRegionRequest* request,
                                      v1::GetRegionResponse* response) override;
  grpc::ServerUnaryReactor* RenewRegion(grpc::CallbackServerContext* context,
                                        const v1::RenewRegionRequest* request,
                                        v1::RenewRegionResponse* response) override;
  grpc::ServerUnaryReactor* UnregisterRegion(grpc::CallbackServerContext* context,
                                             const v1::UnregisterRegionRequest* request,
                                             v1::UnregisterRegionResponse* response) override;

 private:
  // Answers with what `call` makes of the registry and the tenant.
  template <typename Call>
  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, Call call);

  absl::StatusOr<transport::RegisteredRegion> RegisterGpuMemory(const v1::CudaIpcMemory& memory,
                                                                const transport::NewRegion& wanted);

  const std::shared_ptr<transport::RegionRegistry> registry_;
  const Backend& backend_;
  const std::shared_ptr<Identity> identity_;
};

}  // namespace structkv::rpc
