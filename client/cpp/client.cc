#include "structkv/client.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/cpp/bytes_pool.h"
#include "client/cpp/replica_set.h"
#include "client/cpp/retry.h"
#include "client/cpp/session_core.h"
#include "client/cpp/stream.h"
#include "client/cpp/transport_choice.h"
#include "grpc/grpc.h"
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

// Has the replicas know of the prompt, and keeps this one, from now to its end.
void Follow(internal::ReplicaSet& replicas, const std::shared_ptr<internal::Replica>& replica,
            BatchPrompt* prompt) {
  auto placement = replicas.Place(replica, internal::EstimatedBytes(prompt->open));
  PromptOptions& options = prompt->options;
  options.on_opened = [placement, next = std::move(options.on_opened)](const v1::Opened& opened) {
    placement->OnOpened(opened.reserved_bytes());
    if (next) next(opened);
  };
  options.on_end = [placement, next = std::move(options.on_end)](const absl::Status& status) {
    placement->OnEnd(status);
    if (next) next(status);
  };
}

// Opens `prompts` in one stream to `replica`, with what `offer` says; what came of each.
std::vector<Opening> TryOpen(std::vector<BatchPrompt> prompts,
                             const absl::StatusOr<internal::Offer>& offer,
                             const StreamOptions& options,
                             const std::shared_ptr<internal::BytesPool>& pool,
                             internal::ReplicaSet& replicas,
                             const std::shared_ptr<internal::Replica>& replica,
                             absl::Time deadline) {
  std::vector<absl::StatusOr<internal::SharedPlace>> places;
  uint32_t count = 0;
  for (BatchPrompt& prompt : prompts) {
    places.push_back(offer.ok()
                         ? internal::PlacePrompt(*offer, options, prompt.options, &prompt.open)
                         : offer.status());
    if (places.back().ok()) ++count;
  }
  StreamOptions stream_options = options;
  stream_options.replica = replica->address;
  auto stream = std::make_shared<internal::Stream>(std::move(stream_options), replicas.several());
  std::vector<Opening> openings;
  std::vector<internal::SessionCore*> started;
  for (size_t i = 0; i < prompts.size(); ++i) {
    if (!places[i].ok()) {
      openings.emplace_back(places[i].status());
      continue;
    }
    // One prompt alone is no batch.
    prompts[i].open.set_batch_prompt_count(count == 1 ? 0 : count);
    if (replica != replicas.only()) Follow(replicas, replica, &prompts[i]);
    auto core =
        std::make_unique<internal::SessionCore>(std::move(prompts[i]), *std::move(places[i]), pool,
                                                stream, static_cast<uint32_t>(started.size()));
    started.push_back(core.get());
    openings.emplace_back(std::move(core));
  }
  if (started.empty()) return openings;
  stream->Start(replica->channel, deadline, started);
  for (Opening& opening : openings) {
    if (!opening.ok()) continue;
    const absl::Status status = (*opening)->WaitOpened();
    if (!status.ok()) opening = status;
  }
  return openings;
}

// Whether the prompts are ranks' of groups, which must meet.
bool MustMeet(const v1::Open& open) { return open.shard_group().shard_count() > 1; }

// Where a stream of `prompts` may go: for the ranks of a group the same, whichever of a batch's
// prompts are still to be opened.
internal::PlacementRequest RequestFor(absl::Span<const BatchPrompt> prompts) {
  internal::PlacementRequest request;
  if (prompts.empty()) return request;
  const v1::Open& first = prompts.front().open;
  if (MustMeet(first)) request.group = first.shard_group().group_id();
  for (const BatchPrompt& prompt : prompts) {
    if (prompt.open.output() == v1::OUTPUT_HOLD) request.holds = true;
  }
  return request;
}

// Memory of the host needs no other transport than the messages, unless that is asked for: which
// replica is on this host is not known before one is chosen.
StreamOptions OptionsAmong(const internal::ReplicaSet& replicas, const StreamOptions& options) {
  StreamOptions result = options;
  const auto is_gpu = [](const std::shared_ptr<Region>& region) {
    return region != nullptr && region->on_gpu();
  };
  const bool on_gpu = std::any_of(options.regions.begin(), options.regions.end(), is_gpu);
  const bool chooses = replicas.several() && options.replica.empty();
  if (chooses && options.transport == TransportChoice::kAuto && options.nccl == nullptr &&
      !on_gpu) {
    result.transport = TransportChoice::kInline;
  }
  return result;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(const std::string& target,
                                                        const ClientOptions& options) {
  KeepGrpcInitialised();
  auto replicas = internal::ReplicaSet::Connect(target, options);
  if (!replicas.ok()) return replicas.status();
  return std::unique_ptr<Client>(new Client(*std::move(replicas), options));
}

Client::Client(std::shared_ptr<grpc::Channel> channel, const ClientOptions& options)
    : Client(std::make_unique<internal::ReplicaSet>(std::move(channel), options), options) {
  KeepGrpcInitialised();
}

Client::Client(std::unique_ptr<internal::ReplicaSet> replicas, const ClientOptions& options)
    : replicas_(std::move(replicas)),
      pool_(std::make_shared<internal::BytesPool>(options.idle_buffer_bytes)) {}

Client::~Client() = default;

absl::StatusOr<v1::GetCapabilitiesResponse> Client::GetCapabilities(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  const auto replica = replicas_->Choose({}, deadline);
  if (!replica.ok()) return replica.status();
  grpc::ClientContext context;
  if (timeout != absl::InfiniteDuration()) context.set_deadline(absl::ToChronoTime(deadline));
  v1::GetCapabilitiesResponse response;
  const grpc::Status status =
      v1::Compression::NewStub((*replica)->channel)->GetCapabilities(&context, {}, &response);
  if (status.ok()) return response;
  return internal::AtReplica(
      replicas_->several() ? (*replica)->address : "",
      absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message()));
}

absl::Status Client::Register(Region& region, const std::string& tenant) {
  if (replicas_->several()) {
    return absl::FailedPreconditionError(
        "Register: the client has several replicas; a region is registered with the one that its "
        "prompt goes to, when that is opened");
  }
  return replicas_->only()->transports->Register(region, tenant, absl::InfiniteFuture());
}

absl::StatusOr<std::string> Client::ChooseReplica(const v1::Open& open, absl::Duration timeout) {
  internal::PlacementRequest request;
  request.holds = open.output() == v1::OUTPUT_HOLD;
  const auto replica = replicas_->Choose(request, absl::Now() + timeout);
  if (!replica.ok()) return replica.status();
  return (*replica)->address;
}

std::vector<ReplicaState> Client::Replicas() const { return replicas_->Report(); }

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
  const StreamOptions stream = OptionsAmong(*replicas_, options);
  internal::PlacementRequest placement = RequestFor(prompts);
  std::vector<absl::StatusOr<std::unique_ptr<CompressSession>>> results(requests.size());
  std::vector<size_t> due(requests.size());  // of requests
  std::iota(due.begin(), due.end(), size_t{0});
  int unknown = 0;  // attempts whose regions the server did not know
  // Before those that were tried are tried again.
  absl::Duration round_delay = absl::InfiniteDuration();
  for (int attempt = 1; !due.empty();) {
    const auto replica = options.replica.empty() ? replicas_->Choose(placement, deadline)
                                                 : replicas_->At(options.replica, deadline);
    if (!replica.ok()) {
      // What those said that were tried says more than that there is no other one.
      if (placement.tried.empty()) {
        const auto wait = internal::RetryDelay(options.retry, attempt, replica.status());
        for (const size_t i : due) results[i] = replica.status();
        if (!wait.has_value()) break;
        round_delay = *wait;
      } else if (attempt >= options.retry.max_attempts) {
        break;
      }
      if (absl::Now() + round_delay >= deadline) break;
      absl::SleepFor(round_delay);
      round_delay = absl::InfiniteDuration();
      placement.tried.clear();
      ++attempt;
      continue;
    }
    std::vector<BatchPrompt> tried;
    for (const size_t i : due) tried.push_back(requests[i]);
    internal::TransportChooser& transports = *(*replica)->transports;
    const absl::StatusOr<internal::Offer> offer =
        transports.MakeOffer(tried, stream, /*unknown=*/unknown >= 2, deadline);
    auto openings = TryOpen(std::move(tried), offer, stream, pool_, *replicas_, *replica, deadline);
    // A prompt that need not meet others may go elsewhere, at once.
    const bool elsewhere =
        replicas_->several() && options.replica.empty() && placement.group.empty();
    const int last = std::max(1, options.retry.max_attempts - 1);
    const int counted = elsewhere ? std::min(attempt, last) : attempt;
    bool admitted = false;
    bool lost = false;
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
      const bool unknown_region = absl::IsNotFound(status) && offer.ok() && !offer->nothing();
      if (unknown_region && unknown < (stream.transport == TransportChoice::kAuto ? 2 : 1)) {
        lost = true;
        again.push_back(due[i]);  // at once: registered anew or, had that been done, inline
      } else if (const auto wait = internal::RetryDelay(options.retry, counted, status)) {
        again.push_back(due[i]);
        delay = std::max(delay, *wait);
      }
    }
    if (admitted || again.empty()) break;
    due = std::move(again);
    openings.clear();
    if (lost) {
      ++unknown;
      transports.Forget(*offer);
    } else if (elsewhere) {
      round_delay = std::min(round_delay, delay);
      placement.tried.insert((*replica)->address);
      continue;
    }
    if (absl::Now() + delay >= deadline) break;
    absl::SleepFor(delay);
    ++attempt;
  }
  return results;
}

}  // namespace structkv::client
