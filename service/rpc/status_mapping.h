// The one place where absl::Status becomes gRPC's, and back.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/status.h"

namespace structkv::rpc {

// Trailing metadata that tells a client when to try again, in milliseconds (gRPC's own name).
inline constexpr char kRetryPushbackKey[] = "grpc-retry-pushback-ms";

// Texts beyond this are cut: they travel in HTTP/2 trailers, whose size is limited.
inline constexpr size_t kMaxErrorTextBytes = 2048;

// Codes are the same numbers on both sides.
grpc::Status ToGrpc(const absl::Status& status);
absl::Status FromGrpc(const grpc::Status& status);

// As ServerContext::TryCancel, which knows no other status than CANCELLED: gRPC's server sends it
// past the stream's flow control.
void CancelCall(grpc::CallbackServerContext* context, const grpc::Status& status);

// What kRetryPushbackKey says beside a refusal for lack of room: `pushback`, or -1 (never) where
// the prompt is larger than the whole budget.
int64_t RetryPushbackMillis(const absl::Status& refusal, absl::Duration pushback);

// "INVALID_ARGUMENT".
const char* CodeName(grpc::StatusCode code);

}  // namespace structkv::rpc
