#include "client/cpp/transport_choice.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "structkv/sizes.h"
#include "structkv/v1/compression.grpc.pb.h"

namespace structkv::client::internal {
namespace {

constexpr size_t kMaxRegions = 64;
constexpr absl::Duration kCapabilitiesLimit = absl::Seconds(10);
// How long a server that lacks a transport is taken to lack it, where it is only a wish.
constexpr absl::Duration kAskAgain = absl::Seconds(10);
// How long rooms that come back are waited for.
constexpr absl::Duration kReleaseLimit = absl::Seconds(1);
constexpr char kTenantKey[] = "structkv-tenant";

const char* NameOf(v1::Transport transport) {
  if (transport == v1::TRANSPORT_INLINE) return "inline";
  if (transport == v1::TRANSPORT_NCCL) return "NCCL";
  return transport == v1::TRANSPORT_CUDA_IPC ? "CUDA IPC" : "shared memory";
}

// Of regions.
v1::Transport TransportOf(bool on_gpu) {
  return on_gpu ? v1::TRANSPORT_CUDA_IPC : v1::TRANSPORT_SHARED_MEMORY;
}

// Each once.
std::vector<std::shared_ptr<Region>> RegionsOf(absl::Span<const BatchPrompt> prompts,
                                               const StreamOptions& options) {
  std::vector<std::shared_ptr<Region>> regions;
  const auto add = [&](const std::shared_ptr<Region>& region) {
    if (std::find(regions.begin(), regions.end(), region) == regions.end()) {
      regions.push_back(region);
    }
  };
  for (const auto& region : options.regions) add(region);
  if (options.staging != nullptr) add(options.staging->region());
  for (const BatchPrompt& prompt : prompts) {
    if (prompt.options.results != nullptr) add(prompt.options.results->region());
  }
  return regions;
}

// By its name, if it was asked for by that.
std::optional<v1::Transport> Named(TransportChoice choice) {
  switch (choice) {
    case TransportChoice::kSharedMemory:
      return v1::TRANSPORT_SHARED_MEMORY;
    case TransportChoice::kCudaIpc:
      return v1::TRANSPORT_CUDA_IPC;
    case TransportChoice::kNccl:
      return v1::TRANSPORT_NCCL;
    default:
      return std::nullopt;
  }
}

// Of a region of a GPU.
const CudaDevice& GpuOf(const Region& region) { return region.gpu_memory()->device(); }

// Whether the transport that was asked for by name, if one was, can use the regions, or copy from
// them.
absl::Status CheckRegions(const OfferRequest& request) {
  const std::vector<std::shared_ptr<Region>>& regions = request.regions;
  const bool is_inline = request.choice == TransportChoice::kInline;
  const std::optional<v1::Transport> named = Named(request.choice);
  const auto invalid = [&](const auto&... text) {
    const v1::Transport transport = is_inline         ? v1::TRANSPORT_INLINE
                                    : regions.empty() ? v1::TRANSPORT_SHARED_MEMORY
                                                      : TransportOf(regions.front()->on_gpu());
    return absl::InvalidArgumentError(
        absl::StrCat(NameOf(named.value_or(transport)), ": ", text...));
  };
  if (named == v1::TRANSPORT_NCCL && request.nccl == nullptr) {
    return invalid("no GPU was given (", request.fetches ? "FetchOptions" : "StreamOptions",
                   ".nccl)");
  }
  if (regions.empty()) {
    return named.has_value() ? invalid("no region was given (", request.field, ")")
                             : absl::OkStatus();
  }
  const bool on_gpu = regions.front()->on_gpu();
  if (named.has_value() && (*named != v1::TRANSPORT_SHARED_MEMORY) != on_gpu) {
    return invalid("the regions are memory of ", on_gpu ? "a GPU, for CUDA IPC" : "the host");
  }
  constexpr absl::string_view kSome =
      "some regions (StreamOptions.regions, .staging, PromptOptions.results) are memory of ";
  for (const auto& region : regions) {
    if (region->on_gpu() != on_gpu) {
      return invalid(kSome, "a GPU and some of the host; all of a stream are of one");
    }
    if (on_gpu && GpuOf(*region).uuid() != GpuOf(*regions.front()).uuid()) {
      return invalid(kSome, "GPU ", GpuOf(*regions.front()).ordinal(), " and some of GPU ",
                     GpuOf(*region).ordinal(), "; all of a stream are of one");
    }
  }
  const bool pairs = on_gpu && request.nccl != nullptr && !is_inline &&
                     named.value_or(v1::TRANSPORT_NCCL) == v1::TRANSPORT_NCCL;
  if (pairs && request.nccl->device().identity().bus_id != GpuOf(*regions.front()).bus_id()) {
    return invalid(request.fetches ? "FetchOptions" : "StreamOptions", ".nccl is GPU ",
                   request.nccl->device().identity().bus_id, ", and the regions are memory of GPU ",
                   GpuOf(*regions.front()).bus_id(), "; both are one");
  }
  if (is_inline || regions.size() <= kMaxRegions) return absl::OkStatus();
  return invalid(regions.size(), " regions are in use; a stream may have ", kMaxRegions);
}

// Of tensors in a GPU's memory, which nothing reaches but by a copy.
absl::Status NotReached(const OfferRequest& request, absl::string_view why) {
  if (request.fetches) {
    return absl::FailedPreconditionError(absl::StrCat(
        request.field, " is memory of a GPU, and no transport can write there: ", why));
  }
  return absl::FailedPreconditionError(
      absl::StrCat("keys and values lie in a GPU's memory, and no transport can read them: ", why,
                   "; StreamOptions.copy_from_gpu would have them copied to the host's"));
}

bool ServerIsAway(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status);
}

bool Pulls(const v1::Open& open) {
  return open.pull() != v1::PULL_UNSPECIFIED && open.pull() != v1::PULL_NONE;
}

bool ReturnsRows(const v1::Open& open) {
  return open.output() != v1::OUTPUT_PLAN && open.output() != v1::OUTPUT_HOLD;
}

// Takes room for results out of `options.results`.
absl::Status PlaceResults(const Offer& offer, const PromptOptions& options, v1::Open* open,
                          SharedPlace* place) {
  if (options.results == nullptr || !ReturnsRows(*open)) return absl::OkStatus();
  if (offer.nothing() && !offer.copies) return absl::OkStatus();  // in messages
  absl::StatusOr<Bytes> results = options.results->Allocate(MostResultBytes(*open));
  if (!results.ok()) {
    return absl::Status(results.status().code(),
                        absl::StrCat("PromptOptions.results: ", results.status().message()));
  }
  place->results = *std::move(results);
  if (place->results.empty() || offer.handles.empty()) return absl::OkStatus();
  place->result_range = *place->Find(place->results.span());
  place->retire = [region = options.results->region(), server = offer.server,
                   handle = offer.handles[place->result_range.region]](const Bytes& block) {
    RetiredBlocks::All().Add({block, region, server, handle});
  };
  open->mutable_result_range()->set_region(place->result_range.region);
  open->mutable_result_range()->set_offset_bytes(place->result_range.offset_bytes);
  open->mutable_result_range()->set_size_bytes(place->result_range.size_bytes);
  return absl::OkStatus();
}

}  // namespace

std::string TenantOf(const std::vector<std::pair<std::string, std::string>>& metadata) {
  for (const auto& [key, value] : metadata) {
    if (key == kTenantKey) return value;
  }
  return "";
}

Offer NoOffer(std::string reason) {
  Offer offer;
  offer.reason = std::move(reason);
  return offer;
}

std::optional<wire::Range> SharedPlace::Find(absl::Span<const std::byte> bytes) const {
  for (size_t i = 0; i < regions.size(); ++i) {
    if (const auto offset = regions[i]->OffsetOf(bytes)) {
      return wire::Range{static_cast<uint32_t>(i), *offset, bytes.size()};
    }
  }
  return std::nullopt;
}

bool TransportChooser::Server::Has(v1::Transport transport) const {
  const auto has = [this](absl::string_view name) {
    return std::find(transports.begin(), transports.end(), name) != transports.end();
  };
  if (transport == v1::TRANSPORT_NCCL) return has("nccl");
  return !socket.empty() && (transport == v1::TRANSPORT_SHARED_MEMORY || has("cuda_ipc"));
}

absl::StatusOr<RegionServer> TransportChooser::ServerFor(v1::Transport transport,
                                                         const std::string& tenant, bool afresh,
                                                         absl::Time deadline) {
  std::optional<Server> server;
  {
    absl::MutexLock lock(&mutex_);
    server = server_;
  }
  const auto lacks = [&] { return !server->Has(transport); };
  if (!server.has_value() || (lacks() && (afresh || absl::Now() - server->asked >= kAskAgain))) {
    absl::StatusOr<Server> asked = Ask(deadline);
    if (!asked.ok()) return asked.status();
    server = *std::move(asked);
    absl::MutexLock lock(&mutex_);
    server_ = server;
  }
  if (!lacks()) {
    return RegionServer{channel_, server->socket, tenant, server->caller, alive_, own_process_};
  }
  const bool no_regions = transport != v1::TRANSPORT_NCCL && server->socket.empty();
  std::string text =
      absl::StrCat("the server has no ", NameOf(transport), " (GetCapabilitiesResponse.");
  if (no_regions) return absl::UnimplementedError(text + "region_socket is empty)");
  absl::StrAppend(&text, "transports: ", absl::StrJoin(server->transports, ", "), ")");
  for (const std::string& missing : server->missing) absl::StrAppend(&text, "; ", missing);
  return absl::UnimplementedError(text);
}

absl::StatusOr<TransportChooser::Server> TransportChooser::Ask(absl::Time deadline) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(std::min(deadline, absl::Now() + kCapabilitiesLimit)));
  v1::GetCapabilitiesResponse response;
  const grpc::Status status =
      v1::Compression::NewStub(channel_)->GetCapabilities(&context, {}, &response);
  if (!status.ok()) {
    return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  }
  return Server{response.region_socket(),
                {response.transports().begin(), response.transports().end()},
                {response.missing_transports().begin(), response.missing_transports().end()},
                // By its metadata, which other calls say otherwise; or by its channel.
                absl::StartsWith(response.tenant(), "name:") ? "" : response.tenant(),
                absl::Now()};
}

absl::StatusOr<std::string> TransportChooser::RegisterAt(const RegionServer& server, Region& region,
                                                         absl::Time deadline) {
  absl::StatusOr<std::string> handle = region.Register(server, deadline);
  if (!handle.ok()) ForgetServer();
  return handle;
}

void TransportChooser::ForgetServer() {
  absl::MutexLock lock(&mutex_);
  server_.reset();
}

absl::Status TransportChooser::Register(Region& region, const std::string& tenant,
                                        absl::Time deadline) {
  const absl::StatusOr<RegionServer> server =
      ServerFor(TransportOf(region.on_gpu()), tenant, /*afresh=*/true, deadline);
  if (!server.ok()) return server.status();
  return RegisterAt(*server, region, deadline).status();
}

absl::Status TransportChooser::RegisterAll(const OfferRequest& request, absl::Time deadline,
                                           Offer* offer) {
  const absl::StatusOr<RegionServer> server =
      ServerFor(offer->transport, request.tenant,
                /*afresh=*/request.choice != TransportChoice::kAuto, deadline);
  if (!server.ok()) return server.status();
  offer->server = *server;
  for (const auto& region : offer->regions) {
    absl::StatusOr<std::string> handle = RegisterAt(*server, *region, deadline);
    if (!handle.ok()) return handle.status();
    offer->handles.push_back(*std::move(handle));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<NcclPair>> TransportChooser::Attach(const OfferRequest& request,
                                                                   bool must, absl::Time deadline) {
  const bool afresh = request.choice != TransportChoice::kAuto;
  const auto server = ServerFor(v1::TRANSPORT_NCCL, request.tenant, afresh, deadline);
  if (!server.ok()) return server.status();
  std::shared_ptr<NcclPair> ended;  // before another one, and without the lock: it takes its time
  Attached* attached = nullptr;
  {
    absl::MutexLock lock(&attaching_);
    attached = &attached_[{request.nccl.get(), request.tenant}];
    const auto is_idle = [attached] { return !attached->is_busy; };
    if (!attaching_.AwaitWithDeadline(absl::Condition(&is_idle), deadline)) {
      return absl::UnavailableError("the GPU is still being attached by another thread");
    }
    if (attached->pair != nullptr && !attached->pair->ended()) return attached->pair;
    if (!must && !attached->refused.ok() && absl::Now() - attached->asked < kAskAgain) {
      return attached->refused;
    }
    ended.swap(attached->pair);
    attached->is_busy = true;
  }
  if (ended != nullptr) ended->LimitLeaving(deadline - absl::Now());
  ended.reset();
  auto pair = NcclPair::Attach(channel_, request.nccl, request.tenant, deadline);
  if (!pair.ok()) ForgetServer();
  absl::MutexLock lock(&attaching_);
  // What a caller had no time for is no refusal.
  const absl::Status refused = absl::Now() < deadline ? pair.status() : absl::OkStatus();
  *attached = {pair.ok() ? *pair : nullptr, refused, absl::Now()};
  return pair;
}

absl::StatusOr<Offer> TransportChooser::MakeOffer(absl::Span<const BatchPrompt> prompts,
                                                  const StreamOptions& options, bool unknown,
                                                  absl::Time deadline) {
  return MakeOffer({.regions = RegionsOf(prompts, options),
                    .choice = options.transport,
                    .tenant = TenantOf(options.metadata),
                    .field = "StreamOptions.regions",
                    .nccl = options.nccl,
                    .copy_from_gpu = options.copy_from_gpu,
                    .unknown = unknown},
                   deadline);
}

absl::StatusOr<Offer> TransportChooser::MakeOffer(const OfferRequest& request,
                                                  absl::Time deadline) {
  const std::vector<std::shared_ptr<Region>>& regions = request.regions;
  const bool is_inline = request.choice == TransportChoice::kInline;
  const std::optional<v1::Transport> named = Named(request.choice);
  absl::Status status = CheckRegions(request);
  if (!status.ok()) return status;
  Offer offer;
  if (!regions.empty()) offer.gpu = regions.front()->gpu_memory();
  offer.copies = offer.gpu != nullptr && request.copy_from_gpu;
  const bool may_offer = !is_inline && !regions.empty() && !request.unknown;
  if (is_inline) {
    status = absl::CancelledError("inline was asked for");
  } else if (regions.empty()) {
    status = absl::NotFoundError(absl::StrCat("no region was given (", request.field, ")"));
  } else if (request.unknown) {
    status = absl::NotFoundError("the server does not know the registered regions");
  } else if (named != v1::TRANSPORT_NCCL) {
    offer.transport = TransportOf(offer.gpu != nullptr);
    offer.regions = regions;
    status = RegisterAll(request, deadline, &offer);
    // A region socket that is away is not the server's end; memory of a GPU is registered by a
    // call.
    const bool called = offer.server.channel == nullptr || offer.gpu != nullptr;
    if (!status.ok() && (named.has_value() || (called && ServerIsAway(status)))) return status;
    if (!status.ok()) offer.handles.clear();
  }
  if (may_offer && offer.gpu != nullptr && request.nccl != nullptr &&
      named.value_or(v1::TRANSPORT_NCCL) == v1::TRANSPORT_NCCL) {
    const bool must = offer.handles.empty() && !offer.copies;  // there is nothing else
    absl::StatusOr<std::shared_ptr<NcclPair>> pair =
        Attach(request, must || named.has_value(), deadline);
    if (!pair.ok() && (named.has_value() || (must && ServerIsAway(pair.status())))) {
      return pair.status();
    }
    if (pair.ok()) {
      offer.pair = *std::move(pair);
    } else {
      status = absl::FailedPreconditionError(absl::StrCat(status.message(), status.ok() ? "" : "; ",
                                                          "nccl: ", pair.status().message()));
    }
  }
  if (!is_inline) offer.reason = std::string(status.message());
  if (offer.handles.empty()) offer.regions.clear();
  if (!regions.empty() && RetiredBlocks::All().size() > 0) {
    RetiredBlocks::All().Release(regions, std::min(deadline, absl::Now() + kReleaseLimit));
  }
  if (offer.nothing() && offer.gpu != nullptr && !offer.copies)
    return NotReached(request, status.message());
  return offer;
}

void TransportChooser::Forget(const Offer& offer) {
  for (size_t i = 0; i < offer.regions.size(); ++i) {
    offer.regions[i]->Forget(offer.server, offer.handles[i]);
  }
  if (offer.pair != nullptr) offer.pair->MarkEnded();
  ForgetServer();
}

absl::StatusOr<SharedPlace> PlacePrompt(const Offer& offer, const StreamOptions& stream,
                                        const PromptOptions& options, v1::Open* open) {
  const bool must = stream.transport != TransportChoice::kAuto;
  SharedPlace place;
  place.reason = offer.reason;
  place.gpu = offer.gpu;
  open->clear_transports();
  open->clear_regions();
  open->clear_result_range();
  open->clear_nccl_pair();
  if (offer.gpu != nullptr && Pulls(*open)) {
    return absl::InvalidArgumentError(
        "Open.pull: keys and values lie in a GPU's memory, of which no rows are pulled");
  }
  if (offer.nothing()) {
    if (absl::Status status = PlaceResults(offer, options, open, &place); !status.ok())
      return status;
    return place;
  }
  if (Pulls(*open) && stream.staging == nullptr && !options.rows) {
    place.reason = "pulled rows need a StreamOptions.staging to be gathered in";
    if (must) return absl::InvalidArgumentError(absl::StrCat("shared memory: ", place.reason));
    return place;
  }
  place.staging = stream.staging;
  if (!offer.handles.empty()) {
    open->add_transports(offer.transport);
    for (const std::string& handle : offer.handles) open->add_regions(handle);
    place.regions = offer.regions;
  }
  if (offer.pair != nullptr && options.results == nullptr && ReturnsRows(*open)) {
    place.reason = "NCCL: PromptOptions.results is null, and kept rows are received there";
    if (must || (offer.handles.empty() && !offer.copies)) {
      return absl::InvalidArgumentError(place.reason);
    }
  } else if (offer.pair != nullptr) {
    open->add_transports(v1::TRANSPORT_NCCL);
    open->set_nccl_pair(offer.pair->name());
    place.pair = offer.pair;
  }
  if (!must && (offer.gpu == nullptr || offer.copies)) open->add_transports(v1::TRANSPORT_INLINE);
  if (absl::Status status = PlaceResults(offer, options, open, &place); !status.ok()) return status;
  return place;
}

}  // namespace structkv::client::internal
