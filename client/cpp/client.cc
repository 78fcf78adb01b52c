#include "structkv/client.h"

#include <algorithm>
#include <random>
#include <string>
#include <utility>

#include "absl/random/random.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/cpp/bytes_pool.h"
#include "client/cpp/session_core.h"
#include "grpc/grpc.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/support/channel_arguments.h"
#include "structkv/v1/compression.grpc.pb.h"

namespace structkv::client {
namespace {

// gRPC's shutdown can hang for ten seconds in a program that ends while the last call is cleaned
// up; one more reference, never given back, keeps it from shutting down.
void KeepGrpcInitialised() {
  static const bool once = [] {
    grpc_init();
    return true;
  }();
  static_cast<void>(once);
}

std::string NewIdempotencyKey() {
  std::random_device random;
  const auto word = [&random] { return (uint64_t{random()} << 32) | random(); };
  const uint64_t high = word();
  return absl::StrFormat("%016x%016x", high, word());
}

// How long to wait before the next attempt; nullopt: no next one.
std::optional<absl::Duration> RetryDelay(const RetryPolicy& policy, int attempt,
                                         const absl::Status& status,
                                         std::optional<int64_t> pushback_millis) {
  const bool unavailable = status.code() == absl::StatusCode::kUnavailable;
  const bool told =
      status.code() == absl::StatusCode::kResourceExhausted && pushback_millis.has_value();
  if ((!unavailable && !told) || attempt >= policy.max_attempts) return std::nullopt;
  if (pushback_millis.has_value()) {
    if (*pushback_millis < 0) return std::nullopt;
    return absl::Milliseconds(*pushback_millis);
  }
  absl::Duration delay = policy.initial_backoff;
  for (int i = 1; i < attempt; ++i) delay = std::min(policy.max_backoff, delay * policy.multiplier);
  absl::BitGen gen;
  return std::min(policy.max_backoff, delay) * absl::Uniform(gen, 0.8, 1.0);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(const std::string& target,
                                                        const ClientOptions& options) {
  if (target.empty()) return absl::InvalidArgumentError("Connect: the target is empty");
  KeepGrpcInitialised();
  grpc::ChannelArguments args;
  // Identity alone, in either direction.
  args.SetInt(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1);
  args.SetMaxReceiveMessageSize(-1);
  args.SetMaxSendMessageSize(-1);
  // gRPC's own retries would keep a copy of what is sent, and cannot know the protocol.
  args.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  // A connection of its own, not one shared with other clients of this process.
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  args.SetUserAgentPrefix(options.user_agent);
  if (options.keepalive_interval != absl::InfiniteDuration()) {
    args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS,
                static_cast<int>(absl::ToInt64Milliseconds(options.keepalive_interval)));
  }
  std::shared_ptr<grpc::ChannelCredentials> credentials =
      options.credentials ? options.credentials : grpc::InsecureChannelCredentials();
  return std::make_unique<Client>(grpc::CreateCustomChannel(target, credentials, args), options);
}

Client::Client(std::shared_ptr<grpc::Channel> channel, const ClientOptions& options)
    : channel_(std::move(channel)),
      pool_(std::make_shared<internal::BytesPool>(options.idle_buffer_bytes)) {
  KeepGrpcInitialised();
}

Client::~Client() = default;

absl::StatusOr<v1::GetCapabilitiesResponse> Client::GetCapabilities(absl::Duration timeout) {
  grpc::ClientContext context;
  if (timeout != absl::InfiniteDuration()) {
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  }
  v1::GetCapabilitiesResponse response;
  const grpc::Status status =
      v1::Compression::NewStub(channel_)->GetCapabilities(&context, {}, &response);
  if (status.ok()) return response;
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

absl::StatusOr<std::unique_ptr<CompressSession>> Client::OpenPrompt(const v1::Open& open,
                                                                    const SessionOptions& options) {
  const absl::Time deadline = absl::Now() + options.timeout;
  v1::Open request = open;
  if (request.idempotency_key().empty()) request.set_idempotency_key(NewIdempotencyKey());
  for (int attempt = 1;; ++attempt) {
    auto core = std::make_unique<internal::SessionCore>(request, options, pool_);
    core->Start(channel_, deadline);
    const absl::Status status = core->WaitOpened();
    if (status.ok()) {
      if (options.on_opened) options.on_opened(core->opened());
      core->StartEvents();
      return std::unique_ptr<CompressSession>(new CompressSession(std::move(core)));
    }
    const std::optional<absl::Duration> delay =
        RetryDelay(options.retry, attempt, status, core->retry_pushback_millis());
    if (!delay.has_value() || absl::Now() + *delay >= deadline) return status;
    absl::SleepFor(*delay);
  }
}

}  // namespace structkv::client
