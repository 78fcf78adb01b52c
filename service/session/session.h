// One prompt in the service: assembles its layers from pieces, has them compressed, verifies the
// commit, and holds its memory until the end. Knows neither gRPC nor protobuf.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "service/clock.h"
#include "service/engine/buffer_pool.h"
#include "service/engine/prompt.h"
#include "service/engine/prompt_spec.h"
#include "service/engine/scheduler.h"
#include "service/engine/shard.h"
#include "service/engine/stage_times.h"
#include "service/session/held_caches.h"
#include "service/session/memory_budget.h"
#include "service/session/pivot_profile.h"
#include "service/session/tenant_shares.h"
#include "service/transport/negotiation.h"
#include "service/transport/transport.h"

namespace structkv::session {

// That the compacted cache stays in the service, and for whom.
struct HoldRequest {
  std::string tenant;
  std::optional<uint64_t> lease_millis;  // none: the default
};

// What a prompt asks for beyond its spec.
struct SessionRequest {
  engine::PromptSpec spec;
  int64_t layers_in_flight = 2;  // 1 .. layers
  std::string idempotency_key;   // may be empty
  // Longest message that may have to be parked; counted in the reservation.
  int64_t max_message_bytes = 0;
  // The rank that this is, of a prompt that several sessions hold. `spec` is the whole prompt's.
  std::optional<engine::ShardMember> shard;
  // Set: answers have no keys, values and scales; these are held (see HeldCaches). Not for
  // plans, nor with decode_shards above 1.
  std::optional<HoldRequest> hold;
  // What all ranks must say alike: names of fields and their values, sorted by name.
  std::vector<std::pair<std::string, std::string>> agreed;
  // Where its tensors are to lie.
  transport::TransportRequest transport;
};

// One piece of a received message. The data lie in the message, or in a range, or come by a
// transfer.
struct InputPiece {
  int64_t layer = 0;
  engine::InputTensor tensor = engine::InputTensor::kKeys;
  int64_t offset_bytes = 0;
  std::optional<uint64_t> xxh3_64;
  absl::InlinedVector<absl::Span<const std::byte>, 4> data;
  // One of these in place of `data`.
  std::optional<transport::RegionRange> range;
  std::optional<transport::PairTransfer> transfer;
};

// A received message: its pieces, and what keeps their bytes alive.
struct InputMessage {
  std::vector<InputPiece> pieces;
  std::shared_ptr<const void> owner;
};

// Where a compacted cache is held.
struct HeldTicket {
  std::string handle;
  int64_t size_bytes = 0;
  absl::Duration lease;
};

struct SessionSummary {
  int64_t layers = 0;
  int64_t input_bytes = 0;
  int64_t queue_micros = 0;
  int64_t compute_micros = 0;
  int64_t session_micros = 0;
  std::optional<HeldTicket> held;
};

// What became of a layer, how long it waited for a thread, and was computed. Of a shard group, the
// whole layer's.
struct LayerTiming {
  int64_t layer = 0;
  absl::Status status;                          // its rows, or what it failed with
  std::chrono::steady_clock::time_point begun;  // to be computed
  absl::Duration queued;
  absl::Duration computed;
  engine::StageTimes stages;
};

// A session's answers. Called one at a time, never under a lock of the session, from any thread,
// also from within a call to the session. After `finished` or `failed`, which is called once at
// most and not after Cancel(), none is called.
struct SessionCallbacks {
  // The session wants the next message. Called once after Start, and once per message when that was
  // taken in; held back while a message waits for a free layer buffer or while too many results are
  // unsent. Not called after Commit().
  absl::AnyInvocable<void()> ready;
  // A layer's answer, in order of completion.
  absl::AnyInvocable<void(engine::LayerOutput)> layer;
  // A layer was computed, or failed; before what is said of it. Of a shard group the first rank's
  // alone is called. May be empty, as all but `ready` may.
  absl::AnyInvocable<void(LayerTiming)> computed;
  // With PromptSpec::pull: the rows that the client is to send of a layer, once for each, as soon
  // as its positions are known. `layer` follows when they came.
  absl::AnyInvocable<void(engine::RowPull)> pull;
  // The pivot, before the answer of the layer with which it was decided: whoever waits for it need
  // not wait for that layer's tensors, and whoever has the answers of the first n layers knows
  // whether they decided it.
  absl::AnyInvocable<void(engine::PivotResult)> pivot;
  // The commit was verified and everything was answered; of a shard group, all ranks' commits.
  absl::AnyInvocable<void(SessionSummary)> finished;
  // The session failed; its memory is on its way back.
  absl::AnyInvocable<void(absl::Status)> failed;
};

// Whose turn it is, over all layers of a prompt that have begun to come.
enum class Turn : uint8_t {
  kNobodys,  // there are none, or all were answered
  kCallers,  // one is incomplete, or its rows were pulled and have not all come
  kServers,  // all are complete, or come by transfers, and one or more wait for their answers; or
             // rows go back by a transfer
};

// Bytes of a result's tensors, which OutputSent() expects back; of those that were written into a
// region nothing is held, and they are not counted.
int64_t OutputBytes(const engine::LayerOutput& output);
int64_t OutputBytes(const engine::PivotResult& result);
int64_t OutputBytes(const engine::RowPull& pull);

class SessionManager;

// Thread-safe. Dropping the last share cancels it.
class Session : public std::enable_shared_from_this<Session> {
 public:
  ~Session();
  const std::string& id() const;
  const engine::PromptSpec& spec() const;
  int64_t reserved_bytes() const;
  int64_t layers_in_flight() const;
  transport::Kind transport() const;
  // Why it is not one that the request had before it; empty where it is the first.
  const std::string& transport_reason() const;
  // Where rows of the layers' answers lie that are lent.
  const transport::ResultPlace& result_place() const;
  // kNobodys after the end. Of a shard group, over this rank's part of the layers alone.
  Turn turn() const;

  // Sets the callbacks and calls `ready` for the first message.
  void Start(SessionCallbacks callbacks);

  // Takes a message in: copies its bytes to their places and queues layers that are complete. One
  // message at a time, after `ready`. A fault is reported by `failed`:
  //   OUT_OF_RANGE      a layer past the end
  //   INVALID_ARGUMENT  a tensor that this prompt does not have; bytes outside of it; an overlap; a
  //                     layer ahead of the window of layers in flight; empty data; too many pieces
  //                     (PieceMap::MaxPieces); positions that are not the skeleton, that come
  //                     before the pivot, for a layer that must be full, or not before all else of
  //                     their layer; rows of a layer that were not pulled yet; anything after the
  //                     commit
  //   ALREADY_EXISTS    a piece again with other bytes (the same again is ignored); told by the
  //                     bytes while the layer is incomplete, later by the first one's checksum or
  //                     a sample of it
  //   DATA_LOSS         a checksum that does not match
  // With a transport that is in place, also INVALID_ARGUMENT for keys and values that are not one
  // range or transfer of the whole tensor, and FAILED_PRECONDITION where memory of a region is
  // gone. What a transfer fails with (transport::Transfers) is reported by `failed` too.
  void Append(InputMessage message);

  // The client's commit. INVALID_ARGUMENT by `failed` where layers or bytes disagree with what
  // came, naming what is missing. `finished` follows once everything is answered.
  void Commit(int64_t layers, int64_t input_bytes);

  // The client will send no more. INVALID_ARGUMENT by `failed` where no commit came.
  void EndOfInput();

  // Results of that many bytes left for the client; see `ready`. All of OutputBytes() are to be
  // reported in the end: the session keeps its reservation, and counts as active, until then.
  void OutputSent(int64_t bytes);

  // Ends the session by `failed`, as a fault of its own would.
  void Fail(absl::Status status);

  // Drops everything. Memory is free when this returns, or as soon as a layer that is being
  // computed, a call on another thread or the calling callback ends; a GPU's, with transfers, once
  // these have let go of it. `reason` is what the other ranks of a shard group learn.
  void Cancel(absl::Status reason = absl::CancelledError("the session was cancelled"));

  // To be called often. Ends the session by `failed` where the way to the client's memory is gone
  // (transport::Transport::Check), and a shard group that still waits for ranks where it has waited
  // longer than `group_limit`, as DEADLINE_EXCEEDED.
  void CheckPeers(absl::Duration group_limit);

 private:
  friend class SessionManager;
  class Impl;
  explicit Session(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

struct SessionManagerOptions {
  engine::PromptLimits limits;
  int64_t memory_budget_bytes = int64_t{8} << 30;
  int64_t max_sessions = 256;
  int64_t idle_buffer_bytes = int64_t{1} << 30;  // returned memory kept for reuse
  int threads = 0;                               // 0: one per core
  TenantLimits tenants;
  HoldOptions hold;
  std::shared_ptr<const Clock> clock;  // of leases; null: a steady one
  // Pivots by model, for PivotMode::kProfiled; every prompt adds to it. Null: one in memory.
  std::shared_ptr<PivotProfile> pivot_profile;
  // Transports beside inline.
  transport::Offers transports;
};

// Of the options, those that may change while prompts run.
struct SessionLimits {
  engine::PromptLimits prompt;
  int64_t max_sessions = 0;
  TenantLimits tenants;
  absl::Duration hold_lease;
  absl::Duration max_hold_lease;
};
SessionLimits LimitsOf(const SessionManagerOptions& options);

// All sessions of a server. Thread-safe; outlives its sessions.
class SessionManager {
 public:
  SessionManager(const SessionManagerOptions& options, std::unique_ptr<Backend> backend);
  ~SessionManager();

  // Validates, reserves memory and registers. A shard joins its group, which begins with the last
  // one; the ranks that wait in a group end as INVALID_ARGUMENT where the new one disagrees. A
  // running session with the same non-empty idempotency key fails as ABORTED first, and its memory
  // comes back: that waits for a layer that is being computed, and for transfers that are under
  // way, 2 seconds at most. Not to be called from a callback of that session.
  //   INVALID_ARGUMENT    the spec; also what transport::Negotiate returns
  //   RESOURCE_EXHAUSTED  the budget, that of held caches, the transport's own memory, the
  //                       session limit or the tenant's share is taken, or a whole budget or every
  //                       device's memory is too small (payload kNeverFits)
  //   UNIMPLEMENTED       a hold, where nothing is held
  //   UNAVAILABLE         draining
  absl::StatusOr<std::shared_ptr<Session>> Open(const SessionRequest& wanted);

  // Refuses new sessions from now on, and ends shard groups that still wait as UNAVAILABLE.
  void StartDraining();
  bool draining() const;
  // Waits until no session is left; false at the deadline.
  bool WaitUntilEmpty(absl::Duration limit);
  // Fails every running session with `status`.
  void FailAll(const absl::Status& status);

  int64_t active_sessions() const;
  // What finished sessions have left to be fetched.
  HeldCaches& held_caches();
  const HeldCaches& held_caches() const;
  // Memory beside that of sessions, of the tenant's share; as MemoryBudget::Reserve and
  // TenantShares::Take.
  absl::StatusOr<Reservation> Reserve(const std::string& tenant, int64_t bytes);
  const MemoryBudget& budget() const;
  engine::BufferPool& buffers();
  const engine::BufferPool& buffers() const;
  const Backend& backend() const;
  // The threads that compute.
  engine::Scheduler& scheduler();
  const SessionManagerOptions& options() const;
  // What new prompts are held to.
  SessionLimits limits() const;
  // Applies to prompts, shares and leases from now on; what runs and what is held stays.
  void SetLimits(const SessionLimits& limits);
  int threads() const;
  // Complete layers that wait for a thread.
  int64_t queue_depth() const;

 private:
  friend class Session;
  class Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace structkv::session
