// One `Compress` stream: decodes what the caller sends, drives the prompt's session with it, and
// sends the answers. No policy of its own beyond the order of messages and the limits of time.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "service/rpc/log.h"
#include "service/rpc/open_decoder.h"
#include "service/rpc/stream_io.h"
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
  // last answer.
  absl::Duration silence = absl::Seconds(60);
  // How long a stream may last.
  absl::Duration session = absl::Minutes(30);
  // How long a shard group waits for its ranks, counted from the first.
  absl::Duration shard_group = absl::Seconds(30);
  // When a caller that found no room should try again.
  absl::Duration retry_pushback = absl::Seconds(1);
};

// What streams share; outlives them.
struct StreamShared {
  StreamLimits limits;
  session::SessionManager* sessions = nullptr;
  StreamSet* streams = nullptr;
  Log* log = nullptr;  // may be null: no log
};

class CompressReactor final : public StreamIo, public Stream {
 public:
  // Owned by gRPC's call: frees itself after the last reaction.
  static CompressReactor* Start(const StreamShared* shared, grpc::CallbackServerContext* context);

  CompressReactor(const StreamShared* shared, grpc::CallbackServerContext* context);

  void CheckLimits(int64_t now) override;
  // Ends the stream: frees the session's memory, then tells the caller.
  void End(const absl::Status& status) override;

 private:
  // What is due from the caller.
  enum class Phase : uint8_t { kOpen, kPieces, kNothing };

  void OnMessage(const grpc::ByteBuffer& message) override;
  void OnEndOfInput(bool cancelled) override;
  void OnSent(int64_t tensor_bytes) override;
  void OnBroken() override;
  void OnGone() override;

  void TakeOpen(const v1::Open& open);
  void TakePieces(wire::Pieces pieces);
  void TakeCommit(const v1::Commit& commit);
  void SendOpened(const session::Session& session);
  session::SessionCallbacks Callbacks();
  void OnAnswered(const session::SessionSummary& summary);
  void OnHalfClose();
  void SendSummary(const session::SessionSummary& summary);
  void Queue(std::vector<OutgoingMessage> messages);

  std::shared_ptr<session::Session> session() const;

  const StreamShared* const shared_;
  const int64_t begun_;
  // Written while the open is taken, read afterwards.
  int64_t max_response_bytes_ = kDefaultMessageBytes;
  v1::Summary summary_;  // what is known of it at open
  // Written by messages, which come one at a time; read by limits too.
  std::atomic<Phase> phase_{Phase::kOpen};
  std::atomic<int64_t> input_bytes_{0};
  std::atomic<int64_t> output_bytes_{0};
  std::atomic<int64_t> layers_{0};
  std::atomic<int64_t> pulls_{0};
  std::atomic<int64_t> answered_at_{0};  // SteadyNanos() of the last answer

  mutable absl::Mutex session_mutex_;
  bool ended_ ABSL_GUARDED_BY(session_mutex_) = false;
  bool half_closed_ ABSL_GUARDED_BY(session_mutex_) = false;  // after the commit
  std::optional<session::SessionSummary> answered_ ABSL_GUARDED_BY(session_mutex_);
  std::shared_ptr<session::Session> session_ ABSL_GUARDED_BY(session_mutex_);
};

}  // namespace structkv::rpc
