#include "service/rpc/nccl_reactor.h"

#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "grpcpp/impl/codegen/proto_utils.h"
#include "service/rpc/status_mapping.h"
#include "structkv/v1/nccl_codec.h"

namespace structkv::rpc {

NcclReactor* NcclReactor::Start(nccl::Hub* hub, std::string tenant, PeerStreams::Place place,
                                grpc::CallbackServerContext* context) {
  auto reactor = std::make_shared<NcclReactor>(hub, std::move(place), context);
  reactor->HoldSelf();
  // The hub may keep the channel for longer than gRPC has the stream.
  const std::weak_ptr<NcclReactor> weak = reactor;
  reactor->pair_ = hub->Attach({[weak](const nccl::ServiceMessage& message) {
                                  if (const auto self = weak.lock()) self->SendToClient(message);
                                },
                                [weak](const absl::Status& status) {
                                  if (const auto self = weak.lock()) self->EndWith(ToGrpc(status));
                                }},
                               std::move(tenant));
  reactor->WantMessage();
  return reactor.get();
}

void NcclReactor::OnMessage(const grpc::ByteBuffer& message) {
  if (message.Length() > kMaxNcclMessageBytes) {
    return Fail(absl::ResourceExhaustedError(absl::StrCat("a message has ", message.Length(),
                                                          " bytes, at most ", kMaxNcclMessageBytes,
                                                          " are allowed")));
  }
  v1::AttachRequest request;
  grpc::ByteBuffer bytes = message;
  if (!grpc::SerializationTraits<v1::AttachRequest>::Deserialize(&bytes, &request).ok()) {
    return Fail(absl::InvalidArgumentError("a message is no AttachRequest"));
  }
  absl::StatusOr<nccl::ClientMessage> decoded = nccl::Decode(request);
  if (!decoded.ok()) return Fail(decoded.status());
  hub_->OnMessage(pair_, *std::move(decoded));
  WantMessage();
}

void NcclReactor::OnEndOfInput(bool cancelled) {
  Fail(absl::UnavailableError(cancelled ? "the client broke off" : "the client left"));
}

void NcclReactor::OnSent(uint32_t /*prompt*/, int64_t bytes, bool /*ends_prompt*/) {
  unread_bytes_ -= bytes;
}

void NcclReactor::OnBroken() { Fail(absl::CancelledError("the stream broke")); }

void NcclReactor::OnGone() {
  hub_->OnEnd(pair_, absl::CancelledError("the stream is over"));
  place_.reset();
}

void NcclReactor::SendToClient(const nccl::ServiceMessage& message) {
  OutgoingMessage outgoing;
  bool own_buffer = false;
  const v1::AttachResponse response = nccl::Encode(message);
  if (!grpc::SerializationTraits<v1::AttachResponse>::Serialize(response, &outgoing.bytes,
                                                                &own_buffer)
           .ok()) {
    return;
  }
  outgoing.tensor_bytes = static_cast<int64_t>(outgoing.bytes.Length());
  if ((unread_bytes_ += outgoing.tensor_bytes) > kMaxNcclUnreadBytes) {
    EndWith(ToGrpc(absl::AbortedError(
        absl::StrCat("the client left more than ", kMaxNcclUnreadBytes, " bytes unread"))));
    return;
  }
  std::vector<OutgoingMessage> messages;
  messages.push_back(std::move(outgoing));
  Send(std::move(messages));
}

void NcclReactor::Fail(const absl::Status& status) {
  EndWith(ToGrpc(status));
  hub_->OnEnd(pair_, status);
}

}  // namespace structkv::rpc
