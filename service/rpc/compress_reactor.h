// One `Compress` stream: decodes what the caller sends, drives its prompts' sessions with it, and
// sends the answers. No policy of its own beyond the order of messages and the limits of time.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "service/live.h"
#include "service/rpc/call_labels.h"
#include "service/rpc/identity.h"
#include "service/rpc/log.h"
#include "service/rpc/open_decoder.h"
#include "service/rpc/peer_streams.h"
#include "service/rpc/stream_io.h"
#include "service/rpc/stream_observer.h"
#include "service/rpc/stream_set.h"
#include "service/session/session.h"
#include "structkv/v1/compression.pb.h"
#include "structkv/v1/piece_codec.h"

namespace structkv::rpc {

struct StreamLimits {
  // Longest message in either direction, bytes; kMinMessageBytes or more.
  int64_t max_message_bytes = kDefaultMessageBytes;
  // How long one message of results may wait for its reader.
  absl::Duration stall = absl::Seconds(30);
  // How long the server waits for a caller's next message, after the one before and after its own
  // last answer. Not counted while it owes an answer (see session::Turn).
  absl::Duration silence = absl::Seconds(60);
  // How long a stream may last.
  absl::Duration session = absl::Minutes(30);
  // How long a shard group waits for its ranks, counted from the first.
  absl::Duration shard_group = absl::Seconds(30);
  // When a caller that found no room should try again.
  absl::Duration retry_pushback = absl::Seconds(1);
};

// Prompts of a batch, at most.
inline constexpr uint32_t kMaxBatchPrompts = 1024;

// What streams share; outlives them.
struct StreamShared {
  Live<StreamLimits> limits;
  session::SessionManager* sessions = nullptr;
  StreamSet* streams = nullptr;
  PeerStreams peers{0};
  Identity* identity = nullptr;
  Log* log = nullptr;                  // may be null: no log
  StreamObserver* observer = nullptr;  // may be null
  std::optional<double> trace_ratio;   // as ReadCallLabels
  std::string region_socket;           // path; empty: none
};

class CompressReactor final : public StreamIo, public Stream {
 public:
  // Owned by gRPC's call: frees itself after the last reaction. `place` is the stream's among those
  // of its peer.
  static CompressReactor* Start(const StreamShared* shared, PeerStreams::Place place,
                                grpc::CallbackServerContext* context);

  CompressReactor(const StreamShared* shared, PeerStreams::Place place,
                  grpc::CallbackServerContext* context);

  void CheckLimits(int64_t now) override;
  // Ends the stream: frees the sessions' memory, then tells the caller.
  void End(const absl::Status& status) override;
  void Report(std::vector<PromptReport>* prompts) const override;

 private:
  // What is due of a prompt from the caller.
  enum class Phase : uint8_t { kOpen, kPieces, kNothing };

  // One prompt of the stream.
  struct Slot {
    explicit Slot(uint32_t number) : index(number) {}

    const uint32_t index;
    // Written while its open is taken, read afterwards.
    int64_t max_response_bytes = kDefaultMessageBytes;
    v1::Summary summary;  // what is known of it at open
    std::string_view wished_transport = "-";
    std::shared_ptr<PromptPicture> picture;
    std::shared_ptr<PromptTimeline> timeline;  // null: the call is not recorded
    transport::ResultPlace place;              // of its results
    std::string refused_by;                    // the limit that did; empty: none
    // Written by messages, which come one at a time.
    Phase phase = Phase::kOpen;
    std::atomic<int64_t> input_bytes{0};
    std::atomic<int64_t> output_bytes{0};
    std::atomic<int64_t> layers{0};
    std::atomic<int64_t> pulls{0};
    // A message of it was read, and the next one of any prompt is not to be read yet. All other
    // sessions have asked for theirs, so whoever takes this down reads on.
    std::atomic<bool> taking{false};
    std::atomic<bool> failed{false};            // of a batch; what comes of it is dropped
    std::shared_ptr<session::Session> session;  // under session_mutex_
    absl::Status status;                        // of `failed`; under session_mutex_
    std::string held;                           // handle; under session_mutex_
    bool told = false;                          // of the handle, in a batch; under session_mutex_
  };

  void OnMessage(const grpc::ByteBuffer& message) override;
  void OnEndOfInput(bool cancelled) override;
  void OnSent(uint32_t prompt, int64_t tensor_bytes, bool ends_prompt) override;
  void OnBroken() override;
  void OnGone() override;

  // Makes the slots, as the stream's first message says.
  absl::Status Begin(const v1::Open& open);
  void TakeOpen(Slot& slot, const v1::Open& open);
  void TakePieces(Slot& slot, wire::Pieces pieces);
  void TakeCommit(Slot& slot, const v1::Commit& commit);
  void SendOpened(Slot& slot, const session::Session& session);
  session::SessionCallbacks Callbacks(Slot& slot, const session::Session& session);
  // Reads on, where a message of the slot was what held the stream up.
  void ReadOn(Slot& slot);
  // What came of the prompt cannot be taken.
  void Refuse(Slot& slot, const absl::Status& status);
  // The prompt failed: ends the stream, or, of a batch, the prompt.
  void Fail(Slot& slot, const absl::Status& status, bool at_open = false);
  void SendSummary(Slot& slot, const session::SessionSummary& summary);
  // Sends a prompt's last message. The stream ends with the last one of all, once the caller has
  // half-closed: nothing can follow then. A summary waits for that; a failure does not, since the
  // caller may half-close only when it knows of that.
  void SendTerminal(const v1::CompressResponse& response);
  void EndIfDue();
  void Queue(Slot& slot, std::vector<OutgoingMessage> messages);
  // Drops what is held and nobody was told of.
  void ReleaseHeld();
  bool IsGone() const;
  // What is known of a prompt; null where there is none.
  PromptReport ReportOf(const Slot* slot, const session::Session* session) const;
  // What is known of the caller before it is read from; an error ends the stream.
  absl::Status Know();
  // Tells the log, and the observer.
  void TellEnd(const Slot* slot, const session::Session* session) const;

  bool is_batch() const { return slots_.size() > 1; }
  std::shared_ptr<session::Session> session(const Slot& slot) const;
  std::vector<std::shared_ptr<session::Session>> AllSessions() const;
  // Layers whose rows were asked for and have not come.
  int64_t UnansweredPulls() const;
  // Whether the caller may wait for an answer: nothing that it began is incomplete.
  static bool OwesAnswer(const std::vector<std::shared_ptr<session::Session>>& sessions);

  const StreamShared* const shared_;
  PeerStreams::Place place_;  // until gRPC's last reaction
  const int64_t begun_;
  // Written before the first message is read.
  std::string tenant_;
  CallLabels labels_;
  // Made by the first message, before there is any session.
  std::vector<std::unique_ptr<Slot>> slots_;
  // SteadyNanos() of the last answer, or of the last look at the limits that found one due.
  std::atomic<int64_t> owed_until_{0};

  mutable absl::Mutex session_mutex_;
  bool ended_ ABSL_GUARDED_BY(session_mutex_) = false;
  bool gone_ ABSL_GUARDED_BY(session_mutex_) = false;  // broken, for good
  bool half_closed_ ABSL_GUARDED_BY(session_mutex_) = false;
  bool over_ ABSL_GUARDED_BY(session_mutex_) = false;      // the end is on its way
  size_t unfinished_ ABSL_GUARDED_BY(session_mutex_) = 0;  // prompts without a last message
  int sending_ ABSL_GUARDED_BY(session_mutex_) = 0;        // threads that send one
  // The summary that ends the stream.
  std::optional<grpc::ByteBuffer> last_ ABSL_GUARDED_BY(session_mutex_);
};

}  // namespace structkv::rpc
