#include "service/rpc/nccl_service.h"

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
  if (hub_ != nullptr) return NcclReactor::Start(hub_, context);
  return new Refusal(
      ToGrpc(absl::UnavailableError(absl::StrCat("no NCCL transport here: ", why_.message()))));
}

}  // namespace structkv::rpc
