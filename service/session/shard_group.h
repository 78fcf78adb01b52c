// A prompt whose heads several sessions hold, the ranks of a tensor-parallel group: they meet here,
// each layer is compressed once all of them have their part of it, and each gets its part of the
// answer. They succeed or fail together.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "service/engine/prompt.h"
#include "service/engine/scheduler.h"
#include "service/session/serial_queue.h"
#include "service/session/session.h"
#include "service/session/session_core.h"

namespace structkv::session {

// Thread-safe. Joining is guarded by a mutex; everything else is tasks of a serial queue, which
// call into the sessions' own queues. No compute thread waits for a rank: a layer's computation is
// posted when its last part is here.
class ShardGroup : public std::enable_shared_from_this<ShardGroup> {
 public:
  // `first` is the request of whoever makes the group, its spec resolved; all ranks get that spec.
  ShardGroup(const SessionRequest& first, const SessionHost& host);
  ~ShardGroup();

  const engine::PromptSpec& spec() const { return first_.spec; }

  // INVALID_ARGUMENT, naming the field and both values, where `request` cannot be a rank beside
  // those that have joined: it disagrees with them, its index is taken, or their heads overlap. A
  // group that still waits then ends with the same status.
  absl::Status Check(const SessionRequest& request);

  // Makes `core` a member. With the last one the group begins, or ends as INVALID_ARGUMENT where
  // heads are missing. False: it is over already, and another one may be made. Else as Check().
  absl::StatusOr<bool> Join(const SessionRequest& request, std::shared_ptr<SessionCore> core);

  // Takes a member out of a group that still waits, so that another may have its place. False: the
  // group waits no longer.
  bool Release(const SessionCore* core);

  // Ends as DEADLINE_EXCEEDED a group that still waits for a rank after `limit`, counted from its
  // making, and one whose ranks have waited for one another that long, each for an answer to a
  // layer that another one has not sent.
  void CheckWait(absl::Duration limit);
  // Ends a group that still waits.
  void EndWait(const absl::Status& status);

  // What the members say. A layer of which all of the member's tensors are here.
  void Offer(int64_t shard_index, engine::LayerInput part);
  // The member can take an answer. Once per answer, and once before the first.
  void HasRoom(int64_t shard_index);
  // The member's commit was verified, and it has all of its answers.
  void Done(int64_t shard_index);
  // The member failed or was cancelled: the others end as ABORTED.
  void Left(const SessionCore* core, const absl::Status& status);

 private:
  using Clock = std::chrono::steady_clock;
  enum class Phase : uint8_t { kWaiting, kRunning, kOver };
  struct Member {
    std::shared_ptr<SessionCore> core;  // null: has not joined
    engine::ShardMember shard;
  };
  using Parts = std::map<int64_t, engine::LayerInput>;  // by shard index
  struct Computed {
    absl::StatusOr<std::vector<engine::LayerOutput>> outputs;
    int64_t culprit = -1;  // shard index
    std::optional<engine::PivotResult> pivot;
    std::shared_ptr<const engine::Skeleton> skeleton;  // with the pivot
    LayerTiming timing;
  };

  void Enqueue(absl::AnyInvocable<void()> event);
  absl::Status CheckLocked(const SessionRequest& request) const;
  int64_t size() const { return first_.shard->shard_count; }
  std::string Name() const;

  // On the serial queue:
  void Begin();
  void Advance();
  void OnComputed(Computed computed);
  void Finish();
  bool StandsStill();
  void CheckStandstill(absl::Duration limit);
  // Ends all members, once and where the phase is `from` at most: `culprit`, which may be null,
  // with `own`, the others with `others`.
  void End(Phase from, const SessionCore* culprit, const absl::Status& own,
           const absl::Status& others);
  // After the end, once no computation runs: the members' memory is theirs again.
  void GiveBack();
  std::vector<std::shared_ptr<SessionCore>> TakeCores();

  // On a thread of the scheduler.
  void Compute(Clock::time_point posted, ParallelFor parallel);
  // Transport::Await() of all ranks; `culprit` is set where it fails.
  absl::Status AwaitInputs(int64_t* culprit);

  const SessionRequest first_;
  const SessionHost host_;
  const Clock::time_point made_ = Clock::now();
  const bool small_;
  const std::shared_ptr<engine::Scheduler::Lane> lane_;

  std::mutex mutex_;
  Phase phase_ = Phase::kWaiting;  // under mutex_
  std::vector<Member> members_;    // under mutex_; by shard index

  SerialQueue queue_;
  // Touched on the serial queue alone.
  bool begun_ = false;
  bool here_ = false;               // a layer may be computed by whoever brings its last part
  std::map<int64_t, Parts> parts_;  // by layer
  std::deque<int64_t> ready_;       // layers of which all parts are here
  std::vector<bool> room_;          // by shard index
  std::vector<bool> done_;          // by shard index
  bool computing_ = false;          // a layer is with the scheduler
  // When it was first seen to stand still, since the last part of a layer came.
  std::optional<Clock::time_point> still_since_;

  // Used by the running computation; dropped once none runs.
  std::optional<engine::Prompt> prompt_;

  // The layer that waits for a thread. Taken back where the group ends first.
  std::mutex next_mutex_;
  std::optional<std::vector<engine::LayerInput>> next_;
};

}  // namespace structkv::session
