// The client's end of a pair: follows the order that the service assigns (hub.h).
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/transport/nccl/control.h"
#include "service/transport/nccl/outbox.h"
#include "service/transport/nccl/worker.h"

namespace structkv::nccl {

// Thread-safe. Its callbacks come on the worker's thread or on the channel's, without a lock. The
// first error ends it, and with it every transfer, as UNAVAILABLE.
class ClientPair : public std::enable_shared_from_this<ClientPair> {
 public:
  // Says hello. `attached` gets the pair's name for `Open`, or why there is none. `worker` must be
  // there until nothing of this object is.
  static std::shared_ptr<ClientPair> Start(
      Worker* worker, const Identity& identity, Channel<ClientMessage> channel,
      absl::AnyInvocable<void(const absl::StatusOr<uint64_t>&)> attached);

  void OnMessage(ServiceMessage message);
  // The control stream is over, however that came about.
  void OnEnd(const absl::Status& why);

  // This end is ready for the transfer that the service knows, or will, under `key`. Errors beside
  // UNAVAILABLE: those of the service (Hub::Submit), and ALREADY_EXISTS.
  void Offer(const std::string& key, Transfer transfer);
  // Takes an offer back that the service has not ordered: its transfer ends with CANCELLED once the
  // service says so. Nothing happens where it is too late for that, or there is none.
  void Withdraw(const std::string& key);
  // Ends the pair: what is under way fails, the communicator is given back.
  void End();

 private:
  using Attached = absl::AnyInvocable<void(const absl::StatusOr<uint64_t>&)>;

  ClientPair(Worker* worker, const Identity& identity, Channel<ClientMessage> channel,
             Attached attached)
      : worker_(worker),
        identity_(identity),
        channel_(std::move(channel)),
        attached_(std::move(attached)) {}

  void Handle(Welcome welcome);
  void Handle(Connect connect);
  void Handle(Order order);
  void Handle(Refused refused);
  void Handle(Close close);
  void Handle(Heartbeat heartbeat);
  void Join(uint64_t generation, const absl::StatusOr<UniqueId>& id);
  void Finish(uint64_t sequence);
  void Fail(const absl::Status& why);
  // What leaves the pair does so through the outbox. Nothing is sent after
  // the end. With the lock held.
  void Send(ClientMessage message);
  void Tell(Transfer transfer, absl::Status status);

  Worker* const worker_;
  const Identity identity_;
  const Channel<ClientMessage> channel_;

  Outbox outbox_;
  std::mutex mutex_;  // guards what follows
  Attached attached_;
  bool ended_ = false;
  uint64_t generation_ = 0;
  PeerId peer_ = 0;  // the generation's
  uint64_t last_sequence_ = 0;
  absl::flat_hash_map<std::string, Transfer> offers_;
};

}  // namespace structkv::nccl
