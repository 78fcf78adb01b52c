// nccl.proto's messages to and from those of service/transport/nccl/control.h.
#pragma once

#include "absl/status/statusor.h"
#include "service/transport/nccl/control.h"
#include "structkv/v1/nccl.pb.h"

namespace structkv::nccl {

v1::AttachRequest Encode(const ClientMessage& message);
v1::AttachResponse Encode(const ServiceMessage& message);

// INVALID_ARGUMENT where nothing is set, a direction is unspecified, a number is out of its type's
// range or an id is of another length.
absl::StatusOr<ClientMessage> Decode(const v1::AttachRequest& message);
absl::StatusOr<ServiceMessage> Decode(const v1::AttachResponse& message);

}  // namespace structkv::nccl
