#include "service/rpc/nccl_service.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "service/rpc/nccl_reactor.h"
#include "service/rpc/refusal.h"

namespace structkv::rpc {
grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* NcclService::Attach(
    grpc::CallbackServerContext* context) {
  absl::StatusOr<PeerStreams::Place> place = peers_.Take(context->peer());
  if (!place.ok()) return RefusedBidi::Start(place.status());
  absl::StatusOr<std::string> tenant = identity_->TenantOf(*context);
  if (!tenant.ok()) return RefusedBidi::Start(tenant.status());
  if (!hubs_.ok()) {
    return RefusedBidi::Start(
        absl::UnavailableError(absl::StrCat("no NCCL transport here: ", hubs_.status().message())));
  }
  nccl::Hub* const hub = *std::min_element(
      hubs_->begin(), hubs_->end(),
      [](nccl::Hub* one, nccl::Hub* other) { return one->stats().pairs < other->stats().pairs; });
  return NcclReactor::Start(hub, *std::move(tenant), *std::move(place), context);
}

}  // namespace structkv::rpc
