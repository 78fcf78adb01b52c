#include "client/cpp/retry.h"

#include <algorithm>
#include <string>

#include "absl/random/random.h"
#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace structkv::client {
namespace {

constexpr char kPushbackKey[] = "grpc-retry-pushback-ms";
constexpr char kPayload[] = "structkv.v1/retry-pushback-ms";

std::optional<int64_t> Pushback(const absl::Status& status) {
  const absl::optional<absl::Cord> payload = status.GetPayload(kPayload);
  int64_t millis = 0;
  if (!payload.has_value() || !absl::SimpleAtoi(std::string(*payload), &millis)) {
    return std::nullopt;
  }
  return millis;
}

}  // namespace

std::optional<absl::Duration> RetryAfter(const absl::Status& status) {
  const std::optional<int64_t> millis = Pushback(status);
  if (!millis.has_value() || *millis < 0) return std::nullopt;
  return absl::Milliseconds(*millis);
}

namespace internal {

void SetPushback(int64_t millis, absl::Status* status) {
  status->SetPayload(kPayload, absl::Cord(absl::StrCat(millis)));
}

absl::Status StatusOfCall(const grpc::Status& ended, const grpc::ClientContext& context) {
  if (ended.ok()) return absl::OkStatus();
  absl::Status status(static_cast<absl::StatusCode>(ended.error_code()), ended.error_message());
  const auto& metadata = context.GetServerTrailingMetadata();
  if (const auto it = metadata.find(kPushbackKey); it != metadata.end()) {
    int64_t millis = 0;
    // As in gRPC's own retries: what cannot be read means "do not try again".
    const absl::string_view text(it->second.data(), it->second.size());
    SetPushback(absl::SimpleAtoi(text, &millis) ? millis : -1, &status);
  }
  return status;
}

std::optional<absl::Duration> RetryDelay(const RetryPolicy& policy, int attempt,
                                         const absl::Status& status) {
  const bool told = Pushback(status).has_value();
  const bool may = absl::IsUnavailable(status) || (absl::IsResourceExhausted(status) && told);
  if (!may || attempt >= policy.max_attempts) return std::nullopt;
  if (told) return RetryAfter(status);
  absl::Duration delay = policy.initial_backoff;
  for (int i = 1; i < attempt; ++i) delay = std::min(policy.max_backoff, delay * policy.multiplier);
  absl::BitGen gen;
  return std::min(policy.max_backoff, delay) * absl::Uniform(gen, 0.8, 1.0);
}

}  // namespace internal
}  // namespace structkv::client
