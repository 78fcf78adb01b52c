// When what has failed is tried again.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/status.h"
#include "structkv/options.h"

namespace structkv::client::internal {

// Puts what the server says beside a failure, when to try again, into its status; negative: never.
void SetPushback(int64_t millis, absl::Status* status);

// How a call ended, with what its trailing metadata say about trying again.
absl::Status StatusOfCall(const grpc::Status& ended, const grpc::ClientContext& context);

// How long to wait before the next attempt, where attempt `attempt` (from 1) before the first
// result ended with `status`; nullopt: no next one.
std::optional<absl::Duration> RetryDelay(const RetryPolicy& policy, int attempt,
                                         const absl::Status& status);

}  // namespace structkv::client::internal
