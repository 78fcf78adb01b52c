// The state of one session, shared by its handle, its running layer and the registry.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/engine/prompt.h"
#include "service/engine/scheduler.h"
#include "service/session/held_caches.h"
#include "service/session/layer_assembler.h"
#include "service/session/memory_budget.h"
#include "service/session/serial_queue.h"
#include "service/session/session.h"
#include "service/session/session_plan.h"
#include "service/session/session_registry.h"

namespace structkv::session {

class ShardGroup;
class ShardGroups;

// What a session uses of its server; outlives its layers' computation.
struct SessionHost {
  const Backend* backend = nullptr;
  engine::BufferPool* buffers = nullptr;
  engine::Scheduler* scheduler = nullptr;
  std::shared_ptr<SessionRegistry> registry;
  PivotProfile* pivot_profile = nullptr;
  std::shared_ptr<ShardGroups> groups;
  HeldCaches* held_caches = nullptr;
};

// A cache that a session fills, to be held once the session has finished.
struct Holding {
  std::unique_ptr<HeldCache> cache;  // null: nothing is held
  std::string tenant;
  absl::Duration lease;
};

// Thread-safe; see Session. Every event (a call, a layer that is done) is a task of a serial queue:
// state is touched, and callbacks are called, by those tasks alone, so neither needs a lock. Calls
// from within a callback come after it.
class SessionCore : public std::enable_shared_from_this<SessionCore> {
 public:
  using Clock = std::chrono::steady_clock;

  // What a layer's computation left.
  struct Answer {
    absl::StatusOr<engine::LayerOutput> output;
    std::optional<engine::PivotResult> pivot;
    std::shared_ptr<const engine::Skeleton> skeleton;  // with the pivot
    LayerTiming timing;
  };

  // With a `group`, which it joins before it is used, the session is a rank of it, and the group
  // computes.
  SessionCore(std::string id, const SessionRequest& request, const SessionPlan& plan,
              const transport::Granted& granted, Reservation reservation, const SessionHost& host,
              std::shared_ptr<ShardGroup> group = nullptr, Holding holding = {});
  ~SessionCore();

  const std::string& id() const { return id_; }
  const engine::PromptSpec& spec() const { return spec_; }
  int64_t reserved_bytes() const { return plan_.reserved_bytes; }
  int64_t layers_in_flight() const { return layers_in_flight_; }
  transport::Kind transport() const { return transport_kind_; }
  const std::string& transport_reason() const { return transport_reason_; }
  const transport::ResultPlace& result_place() const { return result_place_; }
  // Transport::host_readable().
  bool host_readable() const { return host_readable_; }
  // Transport::Await(), for a group that computes a layer of this rank.
  absl::Status AwaitInput() const { return transport_->Await(); }
  Turn turn() const { return turn_.load(); }
  // Whether a transfer of the prompt is under way.
  bool transfers() const { return transfers_.load(); }

  // As those of Session.
  void Start(SessionCallbacks callbacks);
  void Append(InputMessage message);
  void Commit(int64_t layers, int64_t input_bytes);
  void EndOfInput();
  void OutputSent(int64_t bytes);
  void Cancel(absl::Status reason);
  void CheckPeers(absl::Duration group_limit);

  // Ends the session by `failed`. `replaced`: another one takes its place, for which a group that
  // still waits goes on waiting.
  void Fail(absl::Status status, bool replaced = false);

  // What the group says. This rank's part of a layer's answer.
  void TakeGroupAnswer(Answer answer);
  // A layer of the group failed, for which it is about to end.
  void TellGroupFailure(LayerTiming timing);
  // All ranks have committed, and everything was answered. The group has let go of this one's
  // memory.
  void GroupHasFinished();
  // The group has let go of this one's memory, after its end.
  void GroupIsOver();

 private:
  enum class State : uint8_t { kIdle, kRunning, kCommitted, kFinished, kFailed };
  struct Parked {
    InputMessage message;
    size_t next = 0;  // piece
  };
  void Enqueue(absl::AnyInvocable<void()> event);

  // On the serial queue:
  bool ended() const { return state_ == State::kFinished || state_ == State::kFailed; }
  Turn CurrentTurn() const;
  bool pulls() const { return spec_.pull != engine::Pull::kNone; }
  bool output_full() const {
    if (sending_ >= transport::Transfers::kMostSending) return true;
    const int64_t running = pulls() && layer_runs_ ? plan_.layer_output_bytes : 0;
    return unsent_bytes_ + running + plan_.layer_output_bytes > plan_.output_limit_bytes;
  }
  void TakeMessage(Parked parked);
  void AskForMessage();
  void TellReady();
  // What a transfer is given to call: an event, on a thread of the scheduler, as it may take longer
  // than whoever tells of transfers has.
  transport::Transfers::Done OnTransfer(absl::AnyInvocable<void(const absl::Status&)> event);
  // Begins the transfers that the client has named.
  void ReceiveLayers();
  void OnReceived(int64_t layer, const absl::Status& status);
  // Sends the rows of an answer that go by a transfer.
  void SendRows(const engine::LayerOutput& output);
  void OnRowsSent(const absl::Status& status);
  // Has the next layer computed, by this thread where it `may_run_here` and that is worth it.
  void StartLayer(bool may_run_here);
  // Has the layer after the one that is computed brought to where it will be.
  void StageNext();
  // Whether the thread that reads the stream is the one to compute a layer, if another is idle.
  bool IsForReader() const;
  void OfferLayers();
  void LeaveGroup(const absl::Status& reason);
  void OnAnswer(Answer answer);
  // Keeps the answer of a layer whose rows are to be pulled.
  engine::RowPull WaitForRows(engine::LayerOutput output);
  // Tells of a layer that was computed; of a shard group one rank does.
  void TellComputed(const LayerTiming& timing);
  // Counts a layer's answer, and takes what is held out of it.
  void TakeAnswer(engine::LayerOutput* output);
  // Answers layers whose rows came.
  void AnswerPulled();
  void GoOn();
  void Finish();
  void DoFail(const absl::Status& status);
  void Drop();
  void ReleaseIfFree();

  // On a thread of the scheduler, or in its place.
  void ComputeLayer(Clock::time_point posted, ParallelFor parallel);

  const std::string id_;
  const engine::PromptSpec spec_;
  const engine::PromptSpec own_spec_;  // with this rank's heads alone
  const std::shared_ptr<ShardGroup> group_;
  const int64_t shard_index_;
  const SessionPlan plan_;
  const int64_t layers_in_flight_;
  const transport::Kind transport_kind_;
  const std::string transport_reason_;
  const bool host_readable_;
  const bool in_place_;  // Transport::in_place()
  const transport::ResultPlace result_place_;
  const SessionHost host_;
  const std::shared_ptr<engine::Scheduler::Lane> lane_;
  const std::shared_ptr<engine::Scheduler::Lane> transfer_lane_;  // of ends of transfers
  const std::weak_ptr<const transport::Transport> peers_;         // transport_, for any thread
  std::atomic<bool> stopped_{false};  // ended: whoever works for the session may give up
  std::atomic<bool> cancelled_{false};
  std::atomic<Turn> turn_{Turn::kNobodys};  // after the last event: its answers are out
  std::atomic<bool> transfers_{false};      // likewise

  SerialQueue queue_;
  // Touched on the serial queue alone.
  State state_ = State::kIdle;
  SessionCallbacks callbacks_;
  std::optional<absl::Status> failed_before_start_;
  // Goes with the reservation: until then the peer's memory is in use.
  std::shared_ptr<transport::Transport> transport_;
  std::optional<LayerAssembler> assembler_;
  std::optional<Parked> parked_;
  bool asked_ = false;         // `ready` was called, or is due, and no message came since
  bool ready_due_ = false;     // `ready` is to be called
  bool owes_ready_ = false;    // a message was taken in, and `ready` not called yet
  bool layer_runs_ = false;    // a layer is with the scheduler
  int64_t staged_layer_ = -1;  // the last one that was to be staged
  bool in_group_ = false;      // the group may hold memory of this session
  bool replaced_ = false;      // failed in favour of another session
  bool told_done_ = false;     // the group knows that this rank is done
  bool told_room_ = false;     // the group knows that there is room for an answer
  int64_t unsent_bytes_ = 0;   // of results
  int64_t receiving_ = 0;      // layers whose tensors come by a transfer
  int64_t sending_ = 0;        // layers whose rows go by one
  std::map<int64_t, engine::LayerOutput> wait_for_rows_;  // by layer
  Reservation reservation_;
  engine::BufferAllowance allowance_;  // of the same bytes; goes first
  Holding holding_;
  SessionSummary summary_;
  absl::Duration queued_;
  absl::Duration computed_;
  Clock::time_point started_;

  // Used by the running layer; dropped once none runs.
  std::optional<engine::Prompt> prompt_;

  // The layer that waits for a thread. Taken back where the session ends first.
  std::mutex next_mutex_;
  std::optional<engine::LayerInput> next_;
};

}  // namespace structkv::session
