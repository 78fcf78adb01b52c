#include "client/cpp/transport_choice.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "client/cpp/registration_lease.h"
#include "structkv/sizes.h"
#include "structkv/v1/compression.grpc.pb.h"

namespace structkv::client::internal {
namespace {

constexpr size_t kMaxRegions = 64;
constexpr absl::Duration kCapabilitiesLimit = absl::Seconds(10);
// How long a server that lacks a transport is taken to lack it, where it is only a wish.
constexpr absl::Duration kAskAgain = absl::Seconds(10);
constexpr char kTenantKey[] = "structkv-tenant";

std::string TenantOf(const StreamOptions& options) {
  for (const auto& [key, value] : options.metadata) {
    if (key == kTenantKey) return value;
  }
  return "";
}

const char* NameOf(v1::Transport transport) {
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

// Whether the transport that was asked for by name, if one was, can use the regions.
absl::Status CheckRegions(absl::Span<const std::shared_ptr<Region>> regions,
                          const StreamOptions& options) {
  const bool by_name = options.transport == TransportChoice::kSharedMemory ||
                       options.transport == TransportChoice::kCudaIpc;
  const v1::Transport named = TransportOf(options.transport == TransportChoice::kCudaIpc);
  if (regions.empty()) {
    if (!by_name) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(NameOf(named), ": no region was given (StreamOptions.regions)"));
  }
  const v1::Transport transport = TransportOf(regions.front()->on_gpu());
  if (by_name && named != transport) {
    return absl::InvalidArgumentError(
        absl::StrCat(NameOf(named), ": the regions are memory of ",
                     regions.front()->on_gpu() ? "a GPU, for CUDA IPC" : "the host"));
  }
  for (const auto& region : regions) {
    if (region->on_gpu() == regions.front()->on_gpu()) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(NameOf(transport),
                     ": some regions (StreamOptions.regions, .staging, "
                     "PromptOptions.results) are memory of a GPU and some of the host; all of a "
                     "stream are of one"));
  }
  if (regions.size() <= kMaxRegions) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(NameOf(transport), ": ", regions.size(),
                                                 " regions are in use; a stream may have ",
                                                 kMaxRegions));
}

// Of keys and values in a GPU's memory, which nothing reads but by a copy.
absl::Status NotCopied(absl::string_view why) {
  return absl::FailedPreconditionError(
      absl::StrCat("keys and values lie in a GPU's memory, and no transport can read them: ", why,
                   "; StreamOptions.copy_from_gpu would have them copied to the host's"));
}

bool ServerIsAway(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status);
}

// How long a server that does not answer may use the region.
absl::Duration PatienceOf(const Region& region) {
  if (!region.on_gpu()) return absl::InfiniteDuration();  // it is nobody else's
  return LeaseOf(region.options()) + region.options().quarantine;
}

bool Pulls(const v1::Open& open) {
  return open.pull() != v1::PULL_UNSPECIFIED && open.pull() != v1::PULL_NONE;
}

// Takes room for results out of `options.results`.
absl::Status PlaceResults(const Offer& offer, const PromptOptions& options, v1::Open* open,
                          SharedPlace* place) {
  const bool no_rows = open->output() == v1::OUTPUT_PLAN || open->output() == v1::OUTPUT_HOLD;
  if (options.results == nullptr || no_rows) return absl::OkStatus();
  if (offer.regions.empty() && !offer.copies) return absl::OkStatus();  // in messages
  absl::StatusOr<Bytes> results = options.results->Allocate(MostResultBytes(*open));
  if (!results.ok()) {
    return absl::Status(results.status().code(),
                        absl::StrCat("PromptOptions.results: ", results.status().message()));
  }
  place->results = *std::move(results);
  if (place->results.empty() || offer.handles.empty()) return absl::OkStatus();
  place->result_range = *place->Find(place->results.span());
  place->retire = [server = offer.server, patience = PatienceOf(*options.results->region()),
                   handle = offer.handles[place->result_range.region]](const Bytes& block) {
    RetiredBlocks::All().Add({block, server, handle, patience});
  };
  open->mutable_result_range()->set_region(place->result_range.region);
  open->mutable_result_range()->set_offset_bytes(place->result_range.offset_bytes);
  open->mutable_result_range()->set_size_bytes(place->result_range.size_bytes);
  return absl::OkStatus();
}

}  // namespace

std::optional<wire::Range> SharedPlace::Find(absl::Span<const std::byte> bytes) const {
  for (size_t i = 0; i < regions.size(); ++i) {
    if (const auto offset = regions[i]->OffsetOf(bytes)) {
      return wire::Range{static_cast<uint32_t>(i), *offset, bytes.size()};
    }
  }
  return std::nullopt;
}

bool TransportChooser::Server::Has(v1::Transport transport) const {
  if (socket.empty()) return false;
  return transport == v1::TRANSPORT_SHARED_MEMORY ||
         std::find(transports.begin(), transports.end(), "cuda_ipc") != transports.end();
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
  if (!lacks()) return RegionServer{channel_, server->socket, tenant};
  return absl::UnimplementedError(absl::StrCat(
      "the server has no ", NameOf(transport), " (GetCapabilitiesResponse.",
      server->socket.empty()
          ? "region_socket is empty)"
          : absl::StrCat("transports: ", absl::StrJoin(server->transports, ", "), ")")));
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
                absl::Now()};
}

absl::StatusOr<std::string> TransportChooser::RegisterAt(const RegionServer& server,
                                                         Region& region) {
  absl::StatusOr<std::string> handle = region.Register(server);
  if (!handle.ok()) {  // another server may be there by the next time
    absl::MutexLock lock(&mutex_);
    server_.reset();
  }
  return handle;
}

absl::Status TransportChooser::Register(Region& region, const std::string& tenant,
                                        absl::Time deadline) {
  const absl::StatusOr<RegionServer> server =
      ServerFor(TransportOf(region.on_gpu()), tenant, /*afresh=*/true, deadline);
  if (!server.ok()) return server.status();
  return RegisterAt(*server, region).status();
}

absl::Status TransportChooser::RegisterAll(const StreamOptions& options, absl::Time deadline,
                                           Offer* offer) {
  const absl::StatusOr<RegionServer> server =
      ServerFor(offer->transport, TenantOf(options),
                /*afresh=*/options.transport != TransportChoice::kAuto, deadline);
  if (!server.ok()) return server.status();
  offer->server = *server;
  for (const auto& region : offer->regions) {
    absl::StatusOr<std::string> handle = RegisterAt(*server, *region);
    if (!handle.ok()) return handle.status();
    offer->handles.push_back(*std::move(handle));
  }
  return absl::OkStatus();
}

absl::StatusOr<Offer> TransportChooser::MakeOffer(absl::Span<const BatchPrompt> prompts,
                                                  const StreamOptions& options, bool unknown,
                                                  absl::Time deadline) {
  Offer offer;
  const bool is_inline = options.transport == TransportChoice::kInline;
  offer.regions = RegionsOf(prompts, options);
  absl::Status status = is_inline ? absl::OkStatus() : CheckRegions(offer.regions, options);
  if (!status.ok()) return status;
  const Region* const first = offer.regions.empty() ? nullptr : offer.regions.front().get();
  if (first != nullptr) offer.gpu = first->gpu_memory();
  offer.copies = offer.gpu != nullptr && options.copy_from_gpu;
  if (is_inline) {
    status = absl::CancelledError("inline was asked for");
  } else if (first == nullptr) {
    status = absl::NotFoundError("no region was given (StreamOptions.regions)");
  } else if (unknown) {
    status = absl::NotFoundError("the server does not know the registered regions");
  } else {
    offer.transport = TransportOf(first->on_gpu());
    status = RegisterAll(options, deadline, &offer);
    const bool must = options.transport != TransportChoice::kAuto;
    if (!status.ok() && (must || ServerIsAway(status))) return status;
  }
  if (status.ok()) {
    if (RetiredBlocks::All().size() > 0) RetiredBlocks::All().Release(deadline);
    return offer;
  }
  if (offer.gpu != nullptr && !offer.copies) return NotCopied(status.message());
  Offer nothing;
  nothing.gpu = offer.gpu;
  nothing.copies = offer.copies;
  if (!is_inline) nothing.reason = std::string(status.message());
  return nothing;
}

void TransportChooser::Forget(const Offer& offer) {
  for (size_t i = 0; i < offer.regions.size(); ++i) {
    offer.regions[i]->Forget(offer.server, offer.handles[i]);
  }
  absl::MutexLock lock(&mutex_);
  server_.reset();
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
  if (offer.gpu != nullptr && Pulls(*open)) {
    return absl::InvalidArgumentError(
        "Open.pull: keys and values lie in a GPU's memory, of which no rows are pulled");
  }
  if (!offer.regions.empty()) {
    if (Pulls(*open) && stream.staging == nullptr && !options.rows) {
      place.reason = "pulled rows need a StreamOptions.staging to be gathered in";
      if (must) return absl::InvalidArgumentError(absl::StrCat("shared memory: ", place.reason));
      return place;
    }
    open->add_transports(offer.transport);
    if (!must && (offer.gpu == nullptr || offer.copies)) open->add_transports(v1::TRANSPORT_INLINE);
    for (const std::string& handle : offer.handles) open->add_regions(handle);
    place.regions = offer.regions;
    place.staging = stream.staging;
  }
  if (absl::Status status = PlaceResults(offer, options, open, &place); !status.ok()) return status;
  return place;
}

}  // namespace structkv::client::internal
