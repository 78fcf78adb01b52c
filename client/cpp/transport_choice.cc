#include "client/cpp/transport_choice.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "structkv/sizes.h"
#include "structkv/v1/compression.grpc.pb.h"

namespace structkv::client::internal {
namespace {

constexpr size_t kMaxRegions = 64;
constexpr absl::Duration kCapabilitiesLimit = absl::Seconds(10);
constexpr char kTenantKey[] = "structkv-tenant";

std::string TenantOf(const StreamOptions& options) {
  for (const auto& [key, value] : options.metadata) {
    if (key == kTenantKey) return value;
  }
  return "";
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

bool ServerIsAway(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status);
}

}  // namespace

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

absl::StatusOr<RegionServer> TransportChooser::Server(const std::string& tenant,
                                                      absl::Time deadline) {
  {
    absl::MutexLock lock(&mutex_);
    if (!socket_.empty()) return RegionServer{channel_, socket_, tenant};
  }
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(std::min(deadline, absl::Now() + kCapabilitiesLimit)));
  v1::GetCapabilitiesResponse response;
  const grpc::Status status =
      v1::Compression::NewStub(channel_)->GetCapabilities(&context, {}, &response);
  if (!status.ok()) {
    return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  }
  if (response.region_socket().empty()) {
    return absl::UnimplementedError(
        "the server has no shared memory (GetCapabilitiesResponse.region_socket is empty)");
  }
  absl::MutexLock lock(&mutex_);
  socket_ = response.region_socket();
  return RegionServer{channel_, socket_, tenant};
}

absl::StatusOr<std::string> TransportChooser::Register(Region& region, const std::string& tenant,
                                                       absl::Time deadline) {
  absl::StatusOr<RegionServer> server = Server(tenant, deadline);
  if (!server.ok()) return server.status();
  absl::StatusOr<std::string> handle = region.Register(*server);
  if (!handle.ok()) {  // another server may be there by the next time
    absl::MutexLock lock(&mutex_);
    socket_.clear();
  }
  return handle;
}

absl::StatusOr<Offer> TransportChooser::MakeOffer(absl::Span<const BatchPrompt> prompts,
                                                  const StreamOptions& options,
                                                  absl::Time deadline) {
  Offer offer;
  if (options.transport == TransportChoice::kInline) return offer;
  const bool must = options.transport == TransportChoice::kSharedMemory;
  offer.regions = RegionsOf(prompts, options);
  if (offer.regions.empty()) {
    offer.reason = "no region was given (StreamOptions.regions)";
    if (must) return absl::InvalidArgumentError(absl::StrCat("shared memory: ", offer.reason));
    return offer;
  }
  if (offer.regions.size() > kMaxRegions) {
    return absl::InvalidArgumentError(absl::StrCat("shared memory: ", offer.regions.size(),
                                                   " regions are in use; a stream may have ",
                                                   kMaxRegions));
  }
  const std::string tenant = TenantOf(options);
  const absl::StatusOr<RegionServer> server = Server(tenant, deadline);
  absl::Status status = server.status();
  if (!status.ok() && (must || ServerIsAway(status))) return status;
  for (const auto& region : offer.regions) {
    if (!status.ok()) break;
    absl::StatusOr<std::string> handle = Register(*region, tenant, deadline);
    status = handle.status();
    if (handle.ok()) offer.handles.push_back(*std::move(handle));
  }
  if (status.ok()) {
    offer.server = *server;
    if (RetiredBlocks::All().size() > 0) RetiredBlocks::All().Release(deadline);
    return offer;
  }
  if (must) return status;
  return NoOffer(std::string(status.message()));
}

void TransportChooser::Forget(const Offer& offer, const StreamOptions& options) {
  absl::MutexLock lock(&mutex_);
  for (const auto& region : offer.regions) {
    region->Forget({channel_, socket_, TenantOf(options)});
  }
  socket_.clear();
}

absl::StatusOr<SharedPlace> PlacePrompt(const Offer& offer, const StreamOptions& stream,
                                        const PromptOptions& options, v1::Open* open) {
  const bool must = stream.transport == TransportChoice::kSharedMemory;
  SharedPlace place;
  place.reason = offer.reason;
  open->clear_transports();
  open->clear_regions();
  open->clear_result_range();
  if (offer.regions.empty()) return place;
  const bool pulls = open->pull() != v1::PULL_UNSPECIFIED && open->pull() != v1::PULL_NONE;
  if (pulls && stream.staging == nullptr && !options.rows) {
    place.reason = "pulled rows need a StreamOptions.staging to be gathered in";
    if (must) return absl::InvalidArgumentError(absl::StrCat("shared memory: ", place.reason));
    return place;
  }
  open->add_transports(v1::TRANSPORT_SHARED_MEMORY);
  if (!must) open->add_transports(v1::TRANSPORT_INLINE);
  for (const std::string& handle : offer.handles) open->add_regions(handle);
  place.regions = offer.regions;
  place.staging = stream.staging;
  const bool no_rows = open->output() == v1::OUTPUT_PLAN || open->output() == v1::OUTPUT_HOLD;
  if (options.results == nullptr || no_rows) return place;
  absl::StatusOr<Bytes> results = options.results->Allocate(MostResultBytes(*open));
  if (!results.ok()) {
    return absl::Status(results.status().code(),
                        absl::StrCat("PromptOptions.results: ", results.status().message()));
  }
  if (results->empty()) return place;
  place.results = *std::move(results);
  place.result_range = *place.Find(place.results.span());
  place.retire = [server = offer.server, handle = offer.handles[place.result_range.region]](
                     const Bytes& block) { RetiredBlocks::All().Add(block, server, handle); };
  open->mutable_result_range()->set_region(place.result_range.region);
  open->mutable_result_range()->set_offset_bytes(place.result_range.offset_bytes);
  open->mutable_result_range()->set_size_bytes(place.result_range.size_bytes);
  return place;
}

}  // namespace structkv::client::internal
