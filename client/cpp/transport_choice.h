// Which transport a stream asks for, and where its prompts' tensors lie.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
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
  std::vector<std::shared_ptr<Region>> regions;  // in the order of `Open.regions`; empty: nothing
  std::vector<std::string> handles;
  std::string reason;   // why nothing
  RegionServer server;  // that the handles are of
};

// An empty one.
Offer NoOffer(std::string reason);

// Where a prompt's tensors lie beside its messages, should the server agree.
struct SharedPlace {
  std::vector<std::shared_ptr<Region>> regions;  // in the order of `Open.regions`; empty: nowhere
  std::shared_ptr<Arena> staging;
  Bytes results;  // empty: they come in messages
  wire::Range result_range;
  // Takes the results' memory back where the prompt does not end well.
  std::function<void(const Bytes&)> retire;
  std::string reason;  // why nowhere

  // The range that `bytes`, not empty, are; nullopt: they lie outside of all regions.
  std::optional<wire::Range> Find(absl::Span<const std::byte> bytes) const;
};

// Thread-safe.
class TransportChooser {
 public:
  explicit TransportChooser(std::shared_ptr<grpc::Channel> channel)
      : channel_(std::move(channel)) {}

  // See Client::Register(). The handle.
  absl::StatusOr<std::string> Register(Region& region, const std::string& tenant,
                                       absl::Time deadline);

  // Registers what `prompts` may lie in, and takes back what a server has let go of. Where that is
  // not possible: with kAuto an empty offer, unless the server is away altogether.
  absl::StatusOr<Offer> MakeOffer(absl::Span<const BatchPrompt> prompts,
                                  const StreamOptions& options, absl::Time deadline);

  // The server does not know the handles of `offer`.
  void Forget(const Offer& offer, const StreamOptions& options);

 private:
  absl::StatusOr<RegionServer> Server(const std::string& tenant, absl::Time deadline);

  const std::shared_ptr<grpc::Channel> channel_;
  absl::Mutex mutex_;
  std::string socket_ ABSL_GUARDED_BY(mutex_);  // empty: not asked yet
};

// Puts the offer into `open`, with room for results out of `options.results`.
//   INVALID_ARGUMENT, RESOURCE_EXHAUSTED  as StreamOptions and PromptOptions say
absl::StatusOr<SharedPlace> PlacePrompt(const Offer& offer, const StreamOptions& stream,
                                        const PromptOptions& options, v1::Open* open);

}  // namespace structkv::client::internal
