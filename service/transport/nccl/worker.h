// The thread of one GPU: the only one that uses communicators. It waits for none of them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/transport/nccl/communicator.h"
#include "service/transport/nccl/inbox.h"
#include "service/transport/nccl/reclaimer.h"

namespace structkv::nccl {

struct WorkerStats {
  int live = 0;        // communicators that connect, transfer, idle or close
  int reclaiming = 0;  // those that are being destroyed or aborted
  bool operator==(const WorkerStats&) const = default;
};

// What a caller learns of a communicator, each at most once; all but `connected` may be empty.
struct PeerEvents {
  // How Connect ended.
  Communicator::Done connected;
  // It failed or was aborted; its transfers were told just before.
  Communicator::Done lost;
  // Nothing is left of it: it was closed, or its abort has returned. Not where the worker goes.
  absl::AnyInvocable<void()> gone;
};

// Thread-safe. Its functions return at once. Callbacks come on its thread, without a lock; every
// one is called once. What fails is UNAVAILABLE unless said otherwise, and fails alone: the
// communicators of other peers go on. A failed communicator is aborted.
class Worker {
 public:
  using Done = Communicator::Done;

  // INVALID_ARGUMENT for options out of range, or as DeviceApi::set_device.
  static absl::StatusOr<std::unique_ptr<Worker>> Start(std::shared_ptr<const Api> api,
                                                       const DeviceApi& device_api,
                                                       WorkerOptions options);
  // Stop().
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Names a communicator to be; never given twice.
  PeerId NewPeer() { return ++last_peer_; }
  // A new id. NCCL listens for its two ranks, with a thread and a descriptor, until both came: for
  // ever, where one never does.
  void MakeId(absl::AnyInvocable<void(absl::StatusOr<UniqueId>)> done);
  // Joins as rank 0 or 1. RESOURCE_EXHAUSTED at `max_communicators`, ALREADY_EXISTS for a peer that
  // is connected: then `connected` alone is called.
  void Connect(PeerId peer, const UniqueId& id, int rank, PeerEvents events);
  // Appends a transfer. Both ends must submit the same ones in the same order. May come before
  // Connect is done.
  void Submit(PeerId peer, Transfer transfer);
  // Finalizes once all transfers are through; so must the other end.
  void Close(PeerId peer, Done done);
  // Ends all that is under way with `why`.
  void Abort(PeerId peer, absl::Status why);
  // The peer has shown that it lives.
  void PeerAlive(PeerId peer);

  // Ends the thread: aborts all, as one group, and waits for that up to `abort_limit`. What is
  // asked for afterwards is dropped. Not on its own thread, nor by two at once.
  void Stop();

  WorkerStats stats() const { return {live_.load(), reclaiming_.load()}; }
  // Communicators that failed, or were ended, and so are aborted, since the start.
  int64_t aborts() const { return aborts_.load(); }
  const WorkerOptions& options() const { return options_; }
  int nccl_version() const { return api_->version(); }

 private:
  Worker(std::shared_ptr<const Api> api, const DeviceApi& device_api, WorkerOptions options);

  void Run();
  // On its thread, all of them.
  struct Peer {
    std::unique_ptr<Communicator> communicator;
    PeerEvents events;
  };

  void StepAll();
  Communicator* Find(PeerId peer);
  void Lose(PeerId peer, const absl::Status& why);
  void GiveBackLost();
  void Gone(const std::vector<PeerId>& peers);
  absl::Duration NextWait() const;

  const std::shared_ptr<const Api> api_;
  const DeviceApi device_api_;
  const WorkerOptions options_;
  const std::shared_ptr<Inbox> inbox_ = std::make_shared<Inbox>();
  std::atomic<PeerId> last_peer_ = 0;
  std::atomic<int> live_ = 0;
  std::atomic<int> reclaiming_ = 0;
  std::atomic<int64_t> aborts_ = 0;
  Reclaimer reclaimer_;

  // Its thread's alone.
  absl::flat_hash_map<PeerId, Peer> peers_;
  absl::flat_hash_map<PeerId, absl::AnyInvocable<void()>> on_gone_;  // of those being given back
  std::vector<Remains> lost_;
  bool stopping_ = false;

  std::thread thread_;
};

}  // namespace structkv::nccl
