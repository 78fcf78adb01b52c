// Which transport a stream asks for, and where its prompts' tensors lie.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/cpp/gpu_memory.h"
#include "client/cpp/nccl_device.h"
#include "client/cpp/registration.h"
#include "client/cpp/retired_blocks.h"
#include "grpcpp/channel.h"
#include "structkv/arena.h"
#include "structkv/bytes.h"
#include "structkv/options.h"
#include "structkv/region.h"
#include "structkv/v1/piece_codec.h"

namespace structkv::client::internal {

// What a stream can offer beside messages.
struct Offer {
  v1::Transport transport = v1::TRANSPORT_INLINE;  // that the regions are for; INLINE: none
  std::vector<std::shared_ptr<Region>> regions;    // in the order of `Open.regions`
  std::vector<std::string> handles;                // of those
  RegionServer server;                             // that they are of
  std::shared_ptr<NcclPair> pair;                  // for NCCL; null: none
  std::string reason;                              // why not what is not offered

  bool nothing() const { return handles.empty() && pair == nullptr; }
  // One of them where they are a GPU's, whatever is offered; null: the host's.
  std::shared_ptr<const GpuMemory> gpu;
  bool copies = false;  // and may be copied from there
};

// An empty one.
Offer NoOffer(std::string reason);

// What a call would like to offer.
struct OfferRequest {
  std::vector<std::shared_ptr<Region>> regions;  // each once
  TransportChoice choice = TransportChoice::kAuto;
  std::string tenant;
  const char* field = "";         // of the options, that regions come from
  std::shared_ptr<NcclGpu> nccl;  // null: none
  bool copy_from_gpu = false;     // tensors in a GPU's memory may be copied to the host's
  bool fetches = false;           // the regions are written alone
  bool unknown = false;  // the server does not know the regions although they were registered
};

// The tenant that calls with these metadata are of.
std::string TenantOf(const std::vector<std::pair<std::string, std::string>>& metadata);

// Where a prompt's tensors lie beside its messages, should the server agree.
struct SharedPlace {
  std::vector<std::shared_ptr<Region>> regions;  // in the order of `Open.regions`; empty: nowhere
  std::shared_ptr<Arena> staging;
  Bytes results;  // empty: they come in messages, and stay there
  wire::Range result_range;
  // Takes the results' memory back where the prompt does not end well.
  std::function<void(const Bytes&)> retire;
  std::shared_ptr<NcclPair> pair;        // that they may go by; null: by none
  std::string reason;                    // why nowhere
  std::shared_ptr<const GpuMemory> gpu;  // as in Offer

  // The range that `bytes`, not empty, are; nullopt: they lie outside of all regions.
  std::optional<wire::Range> Find(absl::Span<const std::byte> bytes) const;
};

// Thread-safe.
class TransportChooser {
 public:
  // `own_process`: see ClientOptions.
  TransportChooser(std::shared_ptr<grpc::Channel> channel, bool own_process)
      : channel_(std::move(channel)), own_process_(own_process) {}

  // See Client::Register().
  absl::Status Register(Region& region, const std::string& tenant, absl::Time deadline);

  // Registers the regions, and takes back what a server has let go of. Where that is not possible:
  // with kAuto an offer of nothing, unless the server is away altogether, or tensors would lie in
  // memory of a GPU that nothing reaches (FAILED_PRECONDITION).
  absl::StatusOr<Offer> MakeOffer(const OfferRequest& request, absl::Time deadline);
  // Likewise what `prompts` may lie in.
  absl::StatusOr<Offer> MakeOffer(absl::Span<const BatchPrompt> prompts,
                                  const StreamOptions& options, bool unknown, absl::Time deadline);

  // The server does not know the handles of `offer`.
  void Forget(const Offer& offer);

 private:
  // What a server said of itself.
  struct Server {
    std::string socket;  // empty: it has no regions
    std::vector<std::string> transports;
    std::vector<std::string> missing;  // each with the reason
    std::string caller;                // who it takes this client for; see RegionServer
    absl::Time asked;

    bool Has(v1::Transport transport) const;
  };
  // What came of attaching.
  struct Attached {
    std::shared_ptr<NcclPair> pair;  // null: none
    absl::Status refused;            // why
    absl::Time asked;
    bool is_busy = false;  // a thread is at it
  };
  absl::StatusOr<Server> Ask(absl::Time deadline);
  // Another one may be there by the next time.
  void ForgetServer();
  // UNIMPLEMENTED where the server lacks `transport`, of which it is asked again with `afresh`.
  absl::StatusOr<RegionServer> ServerFor(v1::Transport transport, const std::string& tenant,
                                         bool afresh, absl::Time deadline);
  absl::StatusOr<std::string> RegisterAt(const RegionServer& server, Region& region,
                                         absl::Time deadline);
  // Attaches `request.nccl` where it is not; one that was refused a moment ago only with `must`.
  // UNIMPLEMENTED where the server has no NCCL.
  absl::StatusOr<std::shared_ptr<NcclPair>> Attach(const OfferRequest& request, bool must,
                                                   absl::Time deadline);
  // Registers the regions of `offer`.
  absl::Status RegisterAll(const OfferRequest& request, absl::Time deadline, Offer* offer);

  const std::shared_ptr<grpc::Channel> channel_;
  const bool own_process_;
  const std::shared_ptr<const void> alive_ = std::make_shared<char>();  // RegionServer.client
  absl::Mutex mutex_;
  std::optional<Server> server_ ABSL_GUARDED_BY(mutex_);  // none: not asked yet
  absl::Mutex attaching_;
  // By GPU and tenant.
  std::map<std::pair<NcclGpu*, std::string>, Attached> attached_ ABSL_GUARDED_BY(attaching_);
};

// Puts the offer into `open`, with room for results out of `options.results`.
//   INVALID_ARGUMENT, RESOURCE_EXHAUSTED  as StreamOptions and PromptOptions say
absl::StatusOr<SharedPlace> PlacePrompt(const Offer& offer, const StreamOptions& stream,
                                        const PromptOptions& options, v1::Open* open);

}  // namespace structkv::client::internal
