// The service's end of all pairs of one GPU: attaches clients, gives communicators to those that
// have something to transfer, and assigns the order. client_pair.h is the other end.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/transport/nccl/communicator_cache.h"
#include "service/transport/nccl/control.h"
#include "service/transport/nccl/outbox.h"
#include "service/transport/nccl/transfer_order.h"
#include "service/transport/nccl/worker.h"

namespace structkv::nccl {

struct HubOptions {
  // `tick_interval` is how often a heartbeat is sent: at most half of `silence_limit`. `on_tick` is
  // the hub's own.
  WorkerOptions worker;
  std::string host_id = HostId();
  // How long a transfer of the service's waits for the client's offer, and then for a communicator.
  absl::Duration offer_limit = absl::Seconds(30);
  // Pairs that are attached, of all tenants and of each: a client's GPU needs one.
  int max_pairs = 1024;
  int max_pairs_of_tenant = 256;
};

// Whether a pair still lives. Thread-safe; may outlive the hub.
class PairLife {
 public:
  // UNAVAILABLE, with the reason, once it has ended.
  absl::Status status() const {
    std::lock_guard lock(mutex_);
    return status_;
  }
  void End(absl::Status why) {
    std::lock_guard lock(mutex_);
    status_ = std::move(why);
  }

 private:
  mutable std::mutex mutex_;
  absl::Status status_;
};

struct HubStats {
  int pairs = 0;
  int waiting = 0;  // transfers of the service's, for the client or for their turn
  WorkerStats communicators;
  int64_t aborts = 0;  // of communicators, since the start
};

// Thread-safe. What goes wrong with a pair ends that pair, its transfers and its control stream;
// the others go on.
class Hub {
 public:
  // Random, so that nobody uses another's.
  using PairId = uint64_t;
  using ServiceChannel = Channel<ServiceMessage>;

  // INVALID_ARGUMENT for options out of range; otherwise as Worker::Start.
  static absl::StatusOr<std::unique_ptr<Hub>> Start(std::shared_ptr<const Api> api,
                                                    const DeviceApi& device_api,
                                                    HubOptions options);
  // Stop().
  ~Hub();

  // A control stream was opened, by `tenant`. OnEnd tells that it is over; the channel's `end` is
  // not called then. Ends it as RESOURCE_EXHAUSTED where too many are attached.
  PairId Attach(ServiceChannel channel, std::string tenant = "");
  void OnMessage(PairId pair, ClientMessage message);
  void OnEnd(PairId pair, const absl::Status& why);

  // A pair that `tenant` has attached and that has said hello. NOT_FOUND for any other.
  absl::StatusOr<std::shared_ptr<const PairLife>> Find(PairId pair,
                                                       const std::string& tenant) const;

  // The service is ready for the transfer that the client offers, or will offer, under `key`. Its
  // errors but those of the pair itself (UNAVAILABLE): ALREADY_EXISTS for a key that waits,
  // INVALID_ARGUMENT where the offer is of other lengths or of the same direction,
  // DEADLINE_EXCEEDED where none came within `offer_limit`, or then no communicator was free.
  void Submit(PairId pair, const std::string& key, Transfer transfer);
  // Takes all transfers of an owner back that were not ordered yet; their `done` is called with
  // CANCELLED.
  void Cancel(PairId pair, const void* owner);

  // Ends every new pair at once with `why`; those that there are go on.
  void StopAttaching(const absl::Status& why);
  // The same, and ends all pairs.
  void EndAll(const absl::Status& why);
  // That too, and ends the GPU's thread, which calls nobody any more once this returns. What comes
  // afterwards finds no pair. Not on that thread, nor by two at once.
  void Stop();

  // Whether both ends have been told of the end of all transfers that were ordered.
  bool settled() const;
  HubStats stats() const;
  // The CUDA device.
  int device() const { return options_.worker.device; }

 private:
  enum class State : uint8_t {
    kHello,       // the client has not said who it is
    kIdle,        // no communicator, and none is needed
    kWaiting,     // for a place in the cache
    kJoining,     // the client was asked to join
    kConnecting,  // both do
    kConnected,
    kClosing,  // evicted
  };

  struct Pair {
    std::shared_ptr<const ServiceChannel> channel;
    std::string tenant;
    std::shared_ptr<PairLife> life = std::make_shared<PairLife>();
    State state = State::kHello;
    Clock::time_point deadline;  // of kHello and kJoining
    uint64_t generation = 0;     // counts its communicators
    PeerId peer = 0;             // from kConnecting to kClosing
    TransferOrder order;
    uint64_t own_finished = 0;
    uint64_t client_finished = 0;
    Clock::time_point owes_since;  // `finished`, where it has finished less than the service
    Clock::time_point heard = Clock::now();
  };

  explicit Hub(HubOptions options)
      : options_(std::move(options)), cache_(options_.worker.max_communicators) {}

  // With the lock held, all of these.
  void Handle(PairId id, Pair& pair, Hello hello);
  void Handle(PairId id, Pair& pair, Join join);
  void Handle(PairId id, Pair& pair, Offer offer);
  void Handle(PairId id, Pair& pair, Finished finished);
  void Handle(PairId id, Pair& pair, Heartbeat);
  void Handle(PairId id, Pair& pair, Broken broken);
  void Handle(PairId id, Pair& pair, Withdraw withdraw);

  // What leaves the hub does so through the outbox.
  void Send(Pair& pair, ServiceMessage message);
  void Tell(Transfer transfer, absl::Status status);
  static bool IsSettled(const Pair& pair);
  // Whether one more of the tenant's may be attached.
  absl::Status CheckRoom(const std::string& tenant) const;
  // Goes as far as it can with what both ends are ready for.
  void Advance(PairId id, Pair& pair);
  void StartJoining(Pair& pair);
  void Launch(PairId id, Pair& pair);
  // Takes back what has waited for too long.
  void WithdrawLate(Pair& pair, Clock::time_point now);
  void EvictForThoseWhoWait();
  void ReleasePlace(PairId id);
  void End(PairId id, const absl::Status& why);
  // As End, but for the channel, which is returned; null where there is no such pair.
  std::shared_ptr<const ServiceChannel> Forget(PairId id, const absl::Status& why);

  // On the worker's thread.
  void OnConnected(PairId id, const absl::Status& status);
  void OnLost(PairId id, const absl::Status& why);
  void OnGone(PairId id);
  void OnOwnFinished(PairId id);
  void Tick();

  const HubOptions options_;
  Identity identity_;

  Outbox outbox_;
  mutable std::mutex mutex_;  // guards the following three
  absl::flat_hash_map<PairId, std::unique_ptr<Pair>> pairs_;
  CommunicatorCache cache_;
  absl::Status closed_;  // why no pair is taken any more

  std::unique_ptr<Worker> worker_;  // the first to go
};

}  // namespace structkv::nccl
