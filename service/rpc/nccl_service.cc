#include "service/rpc/nccl_service.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "service/rpc/nccl_reactor.h"
#include "service/rpc/status_mapping.h"

namespace structkv::rpc {
namespace {

class Refusal final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  explicit Refusal(const grpc::Status& status) { Finish(status); }
  void OnDone() override { delete this; }
};

}  // namespace

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* NcclService::Attach(
    grpc::CallbackServerContext* context) {
  absl::StatusOr<std::string> tenant = identity_->TenantOf(*context);
  if (!tenant.ok()) return new Refusal(ToGrpc(tenant.status()));
  if (!hubs_.ok()) {
    return new Refusal(ToGrpc(absl::UnavailableError(
        absl::StrCat("no NCCL transport here: ", hubs_.status().message()))));
  }
  nccl::Hub* const hub = *std::min_element(
      hubs_->begin(), hubs_->end(),
      [](nccl::Hub* one, nccl::Hub* other) { return one->stats().pairs < other->stats().pairs; });
  return NcclReactor::Start(hub, *std::move(tenant), context);
}

}  // namespace structkv::rpc
