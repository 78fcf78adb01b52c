#include "structkv/client.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/cpp/bytes_pool.h"
#include "client/cpp/credentials.h"
#include "client/cpp/retry.h"
#include "client/cpp/session_core.h"
#include "client/cpp/stream.h"
#include "client/cpp/transport_choice.h"
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

using Opening = absl::StatusOr<std::unique_ptr<internal::SessionCore>>;

// Opens `prompts` in one stream, with what `offer` says; what came of each.
std::vector<Opening> TryOpen(std::vector<BatchPrompt> prompts,
                             const absl::StatusOr<internal::Offer>& offer,
                             const StreamOptions& options,
                             const std::shared_ptr<internal::BytesPool>& pool,
                             const std::shared_ptr<grpc::Channel>& channel, absl::Time deadline) {
  std::vector<absl::StatusOr<internal::SharedPlace>> places;
  uint32_t count = 0;
  for (BatchPrompt& prompt : prompts) {
    places.push_back(offer.ok()
                         ? internal::PlacePrompt(*offer, options, prompt.options, &prompt.open)
                         : offer.status());
    if (places.back().ok()) ++count;
  }
  auto stream = std::make_shared<internal::Stream>(options);
  std::vector<Opening> openings;
  std::vector<internal::SessionCore*> started;
  for (size_t i = 0; i < prompts.size(); ++i) {
    if (!places[i].ok()) {
      openings.emplace_back(places[i].status());
      continue;
    }
    // One prompt alone is no batch.
    prompts[i].open.set_batch_prompt_count(count == 1 ? 0 : count);
    auto core =
        std::make_unique<internal::SessionCore>(std::move(prompts[i]), *std::move(places[i]), pool,
                                                stream, static_cast<uint32_t>(started.size()));
    started.push_back(core.get());
    openings.emplace_back(std::move(core));
  }
  if (started.empty()) return openings;
  stream->Start(channel, deadline, started);
  for (Opening& opening : openings) {
    if (!opening.ok()) continue;
    const absl::Status status = (*opening)->WaitOpened();
    if (!status.ok()) opening = status;
  }
  return openings;
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
  auto credentials = internal::CredentialsFor(target, options);
  if (!credentials.ok()) return credentials.status();
  return std::make_unique<Client>(grpc::CreateCustomChannel(target, *credentials, args), options);
}

Client::Client(std::shared_ptr<grpc::Channel> channel, const ClientOptions& options)
    : channel_(std::move(channel)),
      pool_(std::make_shared<internal::BytesPool>(options.idle_buffer_bytes)),
      transports_(std::make_unique<internal::TransportChooser>(channel_, options.own_process)) {
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

absl::Status Client::Register(Region& region, const std::string& tenant) {
  return transports_->Register(region, tenant, absl::InfiniteFuture());
}

absl::StatusOr<std::unique_ptr<CompressSession>> Client::OpenPrompt(const v1::Open& open,
                                                                    const SessionOptions& options) {
  const BatchPrompt prompt = {open, options};
  return std::move(OpenBatch(absl::MakeConstSpan(&prompt, 1), options).front());
}

std::vector<absl::StatusOr<std::unique_ptr<CompressSession>>> Client::OpenBatch(
    absl::Span<const BatchPrompt> prompts, const StreamOptions& options) {
  const absl::Time deadline = absl::Now() + options.timeout;
  std::vector<BatchPrompt> requests(prompts.begin(), prompts.end());
  for (BatchPrompt& request : requests) {
    if (request.open.idempotency_key().empty()) {
      request.open.set_idempotency_key(NewIdempotencyKey());
    }
  }
  std::vector<absl::StatusOr<std::unique_ptr<CompressSession>>> results(requests.size());
  std::vector<size_t> due(requests.size());  // of requests
  std::iota(due.begin(), due.end(), size_t{0});
  int unknown = 0;  // attempts whose regions the server did not know
  for (int attempt = 1; !due.empty(); ++attempt) {
    std::vector<BatchPrompt> tried;
    for (const size_t i : due) tried.push_back(requests[i]);
    const absl::StatusOr<internal::Offer> offer =
        transports_->MakeOffer(tried, options, /*unknown=*/unknown >= 2, deadline);
    auto openings = TryOpen(std::move(tried), offer, options, pool_, channel_, deadline);
    bool admitted = false;
    std::vector<size_t> again;
    absl::Duration delay;
    for (size_t i = 0; i < due.size(); ++i) {
      if (openings[i].ok()) {
        admitted = true;
        results[due[i]] =
            std::unique_ptr<CompressSession>(new CompressSession(*std::move(openings[i])));
        continue;
      }
      const absl::Status& status = openings[i].status();
      results[due[i]] = status;
      const bool lost = absl::IsNotFound(status) && offer.ok() && !offer->nothing();
      if (lost && unknown < (options.transport == TransportChoice::kAuto ? 2 : 1)) {
        again.push_back(due[i]);  // at once: registered anew or, had that been done, inline
      } else if (const auto wait = internal::RetryDelay(options.retry, attempt, status)) {
        again.push_back(due[i]);
        delay = std::max(delay, *wait);
      }
    }
    if (admitted || again.empty() || absl::Now() + delay >= deadline) break;
    if (offer.ok() && absl::IsNotFound(results[again.front()].status())) {
      ++unknown;
      transports_->Forget(*offer);
    }
    due = std::move(again);
    openings.clear();
    absl::SleepFor(delay);
  }
  return results;
}

}  // namespace structkv::client
