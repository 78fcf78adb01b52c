// The servers of a client: one, or several that are found, asked for their load and chosen from.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/cpp/replica_table.h"
#include "client/cpp/target.h"
#include "client/cpp/transport_choice.h"
#include "grpcpp/channel.h"
#include "structkv/options.h"
#include "structkv/replica.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::client::internal {

// One server.
struct Replica {
  std::string address;  // empty: of a channel that was given
  std::string name;     // that its certificate must have; empty: the address's own
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<TransportChooser> transports;
};

// `status` with the address in front, where it is an error; nothing is in front of it where
// `address` is empty.
absl::Status AtReplica(const std::string& address, const absl::Status& status);

class ReplicaSetCore;

// About what the service will reserve for a prompt, before it says so: its layers in flight.
uint64_t EstimatedBytes(const v1::Open& open);

// A prompt at a replica, from the choice of it to the prompt's end, which is also that of the
// object. Thread-safe.
class Placement {
 public:
  // `core`: null where there is no choice.
  Placement(std::shared_ptr<ReplicaSetCore> core, std::shared_ptr<Replica> replica, uint64_t bytes);
  ~Placement();
  Placement(const Placement&) = delete;
  Placement& operator=(const Placement&) = delete;

  void OnOpened(uint64_t reserved_bytes);
  // The stream, or the attempt to open it, ended with this.
  void OnEnd(const absl::Status& status);

 private:
  const std::shared_ptr<ReplicaSetCore> core_;
  const std::shared_ptr<Replica> replica_;
  uint64_t number_ = 0;
};

// Thread-safe. Starts no thread of its own but for looking names up: replicas are asked when a
// prompt is opened.
class ReplicaSet {
 public:
  // INVALID_ARGUMENT as ParseTarget() and CredentialsFor() say.
  static absl::StatusOr<std::unique_ptr<ReplicaSet>> Connect(const std::string& target,
                                                             const ClientOptions& options);
  // One server.
  ReplicaSet(std::shared_ptr<grpc::Channel> channel, const ClientOptions& options);
  ~ReplicaSet();

  // Whether there may be more than one.
  bool several() const;

  // Where a prompt goes; waits until replicas have said what is needed for that.
  //   UNAVAILABLE        no replica can take it; or their own error, where all have the same
  //   DEADLINE_EXCEEDED  by then none had answered
  absl::StatusOr<std::shared_ptr<Replica>> Choose(const PlacementRequest& request,
                                                  absl::Time deadline);
  // The prompt goes there.
  std::shared_ptr<Placement> Place(std::shared_ptr<Replica> replica, uint64_t bytes);

  // The server at this address, which need not be one of the replicas. INVALID_ARGUMENT as
  // CredentialsFor() says, and where the client has a given channel.
  absl::StatusOr<std::shared_ptr<Replica>> At(const std::string& address, absl::Time deadline);
  // All replicas, those first that are well.
  absl::StatusOr<std::vector<std::shared_ptr<Replica>>> All(absl::Time deadline);
  // The only one.
  const std::shared_ptr<Replica>& only() const { return only_; }

  std::vector<ReplicaState> Report() const;

 private:
  explicit ReplicaSet(std::shared_ptr<ReplicaSetCore> core);

  std::shared_ptr<ReplicaSetCore> core_;  // null: of a channel that was given
  std::shared_ptr<Replica> only_;         // null: there may be several
};

}  // namespace structkv::client::internal
