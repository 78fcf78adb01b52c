// One end of a pair: a 2-rank, non-blocking communicator with a stream of its own, so that a hung
// one holds up no other.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/transport/nccl/device_api.h"
#include "service/transport/nccl/nccl_api.h"
#include "service/transport/nccl/transfer.h"
#include "service/transport/nccl/worker_options.h"

namespace structkv::nccl {

// What is left of a communicator and has to be given back: that blocks, even with a non-blocking
// one.
struct Remains {
  PeerId peer = 0;
  Comm* comm = nullptr;  // may be null
  Stream* stream = nullptr;
  bool abort = false;  // else it was finalized
  std::vector<std::shared_ptr<void>> holds;
};

// For the GPU's thread alone.
class Communicator {
 public:
  using Done = absl::AnyInvocable<void(const absl::Status&)>;

  // `api`, `device` and `options` outlive it.
  Communicator(const Api* api, const DeviceApi* device, const WorkerOptions* options, PeerId peer);
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  // Begins to join; `done` says how that ended. After an error only Fail may follow.
  absl::Status Connect(const UniqueId& id, int rank, Done done);
  // Transfers run in the order in which they come.
  void Add(Transfer transfer);
  // Finalizes after the last transfer. No transfer is added after it.
  void Close(Done done);

  // Goes as far as it can without waiting. An error: Fail has to follow.
  absl::Status Step();
  // Whether NCCL has to be asked again soon.
  bool busy() const { return state_ != State::kIdle; }
  bool closed() const { return state_ == State::kClosed; }

  void PeerAlive() { heard_ = Clock::now(); }
  // UNAVAILABLE where the peer was silent for too long.
  absl::Status CheckPeer() const;

  // Ends every callback that waits with `why`, or (closed) with OK, and hands over what is left.
  Remains Fail(const absl::Status& why);
  Remains TakeClosed();

  PeerId peer() const { return peer_; }

 private:
  enum class State : uint8_t { kConnecting, kIdle, kPosting, kRunning, kClosing, kClosed };

  absl::Status PostGroup();
  absl::Status StartClosing();
  // Whether NCCL's own work in the background is through.
  absl::StatusOr<bool> Ready(const char* what);
  void Enter(State state, absl::Duration limit);
  absl::Status CheckDeadline() const;
  std::string Name(const char* what) const;

  const Api* const api_;
  const DeviceApi* const device_;
  const WorkerOptions* const options_;
  const PeerId peer_;
  int rank_ = 0;
  Comm* comm_ = nullptr;
  Stream* stream_ = nullptr;
  State state_ = State::kIdle;
  Clock::time_point deadline_;
  Clock::time_point heard_ = Clock::now();
  Done connected_;
  Done closing_;                            // set: finalizes when the queue is empty
  bool posted_ = false;                     // the front transfer's event was waited for
  std::vector<std::vector<Piece>> groups_;  // of the front transfer
  size_t next_group_ = 0;
  std::deque<Transfer> queue_;
};

}  // namespace structkv::nccl
