#include "structkv/v1/nccl_codec.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

namespace structkv::nccl {
namespace {

void EncodeIdentity(const Identity& identity, v1::NcclHello* hello) {
  hello->set_protocol_version(identity.protocol_version);
  hello->set_nccl_version(static_cast<uint32_t>(identity.nccl_version));
  hello->set_host_id(identity.host_id);
  hello->set_bus_id(identity.bus_id);
  hello->set_group_bytes(static_cast<uint64_t>(identity.group_bytes));
}

// What does not fit is as wrong as the largest that does.
int64_t Clamp(uint64_t value) {
  return static_cast<int64_t>(std::min<uint64_t>(value, std::numeric_limits<int64_t>::max()));
}

Identity DecodeIdentity(const v1::NcclHello& hello) {
  Identity identity;
  identity.protocol_version = hello.protocol_version();
  identity.nccl_version =
      static_cast<int>(std::min<uint32_t>(hello.nccl_version(), std::numeric_limits<int>::max()));
  identity.host_id = hello.host_id();
  identity.bus_id = hello.bus_id();
  identity.group_bytes = Clamp(hello.group_bytes());
  return identity;
}

absl::Status NothingSet(const char* message) {
  return absl::InvalidArgumentError(absl::StrCat(message, ".message is not set"));
}

}  // namespace

v1::AttachRequest Encode(const ClientMessage& message) {
  v1::AttachRequest encoded;
  std::visit(
      Overloaded{
          [&](const Hello& hello) { EncodeIdentity(hello, encoded.mutable_hello()); },
          [&](const Join& join) {
            encoded.mutable_join()->set_generation(join.generation);
            encoded.mutable_join()->set_unique_id(join.id.bytes, sizeof(join.id.bytes));
          },
          [&](const Offer& offer) {
            encoded.mutable_offer()->set_key(offer.key);
            encoded.mutable_offer()->set_direction(offer.direction == Direction::kSend
                                                       ? v1::NCCL_DIRECTION_SEND
                                                       : v1::NCCL_DIRECTION_RECEIVE);
            for (int64_t length : offer.lengths) {
              encoded.mutable_offer()->add_buffer_bytes(static_cast<uint64_t>(length));
            }
          },
          [&](const Finished& finished) {
            encoded.mutable_finished()->set_sequence(finished.sequence);
          },
          [&](const Heartbeat&) { encoded.mutable_heartbeat(); },
          [&](const Broken& broken) { encoded.mutable_broken()->set_why(broken.why); },
          [&](const Withdraw& withdraw) { encoded.mutable_withdraw()->set_key(withdraw.key); }},
      message);
  return encoded;
}

v1::AttachResponse Encode(const ServiceMessage& message) {
  v1::AttachResponse encoded;
  std::visit(
      Overloaded{
          [&](const Welcome& welcome) {
            EncodeIdentity(welcome.identity, encoded.mutable_welcome()->mutable_identity());
            encoded.mutable_welcome()->set_pair(welcome.pair);
            encoded.mutable_welcome()->set_heartbeat_interval_millis(
                static_cast<uint32_t>(absl::ToInt64Milliseconds(welcome.heartbeat_interval)));
          },
          [&](const Connect& connect) {
            encoded.mutable_connect()->set_generation(connect.generation);
          },
          [&](const Order& order) {
            encoded.mutable_order()->set_generation(order.generation);
            encoded.mutable_order()->set_sequence(order.sequence);
            encoded.mutable_order()->set_key(order.key);
          },
          [&](const Refused& refused) {
            encoded.mutable_refused()->set_key(refused.key);
            encoded.mutable_refused()->set_code(static_cast<uint32_t>(refused.why.code()));
            encoded.mutable_refused()->set_why(std::string(refused.why.message()));
          },
          [&](const Close& close) { encoded.mutable_close()->set_generation(close.generation); },
          [&](const Heartbeat&) { encoded.mutable_heartbeat(); }},
      message);
  return encoded;
}

absl::StatusOr<ClientMessage> Decode(const v1::AttachRequest& message) {
  switch (message.message_case()) {
    case v1::AttachRequest::kHello:
      return DecodeIdentity(message.hello());
    case v1::AttachRequest::kJoin: {
      absl::StatusOr<UniqueId> id = ParseUniqueId(message.join().unique_id());
      if (!id.ok()) return id.status();
      return Join{message.join().generation(), *id};
    }
    case v1::AttachRequest::kOffer: {
      const v1::NcclOffer& offer = message.offer();
      if (offer.direction() != v1::NCCL_DIRECTION_SEND &&
          offer.direction() != v1::NCCL_DIRECTION_RECEIVE) {
        return absl::InvalidArgumentError(
            absl::StrCat("NcclOffer.direction is ", offer.direction(), ", 1 or 2 is needed"));
      }
      Offer decoded;
      decoded.key = offer.key();
      decoded.direction =
          offer.direction() == v1::NCCL_DIRECTION_SEND ? Direction::kSend : Direction::kReceive;
      for (uint64_t bytes : offer.buffer_bytes()) decoded.lengths.push_back(Clamp(bytes));
      return decoded;
    }
    case v1::AttachRequest::kFinished:
      return Finished{message.finished().sequence()};
    case v1::AttachRequest::kHeartbeat:
      return Heartbeat{};
    case v1::AttachRequest::kBroken:
      return Broken{message.broken().why()};
    case v1::AttachRequest::kWithdraw:
      return Withdraw{message.withdraw().key()};
    case v1::AttachRequest::MESSAGE_NOT_SET:
      break;
  }
  return NothingSet("AttachRequest");
}

absl::StatusOr<ServiceMessage> Decode(const v1::AttachResponse& message) {
  switch (message.message_case()) {
    case v1::AttachResponse::kWelcome:
      return Welcome{DecodeIdentity(message.welcome().identity()), message.welcome().pair(),
                     absl::Milliseconds(message.welcome().heartbeat_interval_millis())};
    case v1::AttachResponse::kConnect:
      return Connect{message.connect().generation()};
    case v1::AttachResponse::kOrder:
      return Order{message.order().generation(), message.order().sequence(), message.order().key()};
    case v1::AttachResponse::kRefused: {
      const auto code = static_cast<absl::StatusCode>(message.refused().code());
      return Refused{message.refused().key(),
                     code == absl::StatusCode::kOk
                         ? absl::InternalError("the service refused a transfer with code OK")
                         : absl::Status(code, message.refused().why())};
    }
    case v1::AttachResponse::kClose:
      return Close{message.close().generation()};
    case v1::AttachResponse::kHeartbeat:
      return Heartbeat{};
    case v1::AttachResponse::MESSAGE_NOT_SET:
      break;
  }
  return NothingSet("AttachResponse");
}

}  // namespace structkv::nccl
