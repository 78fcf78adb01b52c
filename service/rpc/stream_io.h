// Reading, writing and ending of one bidirectional stream of gRPC's callback API, made safe to use
// from any thread.
//
// gRPC's rules: one read and one write outstanding; exactly one Finish; nothing started after it.
// The state machine below keeps them. All of it is guarded by one mutex, and gRPC is called outside
// of it (a write may spend a millisecond in the socket), so an operation passes three moments:
//
//   decided    under the mutex: `reading_` or `writing_` is set, `starting_` counts the call
//   started    outside: StartRead or StartWrite returns, `starting_` is counted down
//   done       gRPC's reaction: `reading_` or `writing_` is cleared
//
// An end is decided once (`ending_`); from then on nothing is decided but Finish, and that only
// when no thread is between "decided" and "started". Where a write is outstanding at the end, its
// reader may never take it: the call is then cancelled with the same status, which gRPC's server
// sends past the stream's flow control, so that the reader learns it and the memory is free at
// once.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "service/rpc/response_builder.h"

namespace structkv::rpc {

class StreamIo : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                 public std::enable_shared_from_this<StreamIo> {
 public:
  // `context` lives until gRPC's last reaction.
  explicit StreamIo(grpc::CallbackServerContext* context) : context_(context) {}

 protected:
  // The reactions of a stream. OnMessage and OnEndOfInput come one at a time, after WantMessage.
  virtual void OnMessage(const grpc::ByteBuffer& message) = 0;
  // The caller half-closed, or the stream broke; `cancelled` where gRPC says so already.
  virtual void OnEndOfInput(bool cancelled) = 0;
  // A message of that prompt of a batch has left that has tensor bytes, so many, or was its last
  // one.
  virtual void OnSent(uint32_t prompt, int64_t tensor_bytes, bool ends_prompt) = 0;
  // The stream broke or was cancelled. Perhaps more than once, perhaps after the end.
  virtual void OnBroken() = 0;
  // The last reaction.
  virtual void OnGone() = 0;

  // Keeps this object alive until gRPC is done with it. Call once, before returning it to gRPC.
  void HoldSelf() { self_ = shared_from_this(); }

  // Reads one message, unless a read is outstanding or the stream ends.
  void WantMessage();
  // Queues messages to be written. Dropped where the stream ends.
  void Send(std::vector<OutgoingMessage> messages);
  // Queues the last message; the stream ends with OK after it.
  void SendLast(const grpc::ByteBuffer& message);
  // The stream ends with OK once what is queued was written.
  void SendNoMore();
  // Drops the messages with tensors of a prompt that wait to be written.
  void Drop(uint32_t prompt);
  // Ends the stream with an error, drops what is queued. False where its end was decided before.
  bool EndWith(const grpc::Status& status);

  // How the stream ended; OK where it has not.
  grpc::Status end_status() const;
  // When the outstanding read was started, in SteadyNanos(); 0 where there is none.
  int64_t reading_since() const;
  // When the outstanding write, or the end, was started; 0 where there is none.
  int64_t writing_since() const;

  grpc::CallbackServerContext* context() const { return context_; }

 private:
  enum class Action : uint8_t { kNone, kRead, kWrite, kWriteAndFinish, kFinish };

  void OnReadDone(bool ok) final;
  void OnWriteDone(bool ok) final;
  void OnCancel() final { OnBroken(); }
  void OnDone() final;

  // Decides and starts operations until there is nothing to start.
  void Advance();
  Action Decide() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CancelOnce(const grpc::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  grpc::CallbackServerContext* const context_;
  std::shared_ptr<StreamIo> self_;
  grpc::ByteBuffer incoming_;  // the outstanding read's
  OutgoingMessage outgoing_;   // the outstanding write's

  mutable absl::Mutex mutex_;
  bool read_wanted_ ABSL_GUARDED_BY(mutex_) = false;
  bool reading_ ABSL_GUARDED_BY(mutex_) = false;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool last_queued_ ABSL_GUARDED_BY(mutex_) = false;  // the end of the queue ends the stream
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;       // with end_status_
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;     // Finish or StartWriteAndFinish was decided
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;    // CancelOnce was called
  bool gone_ ABSL_GUARDED_BY(mutex_) = false;         // OnDone was called
  int starting_ ABSL_GUARDED_BY(mutex_) = 0;          // threads in StartRead or StartWrite
  int64_t reading_since_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t writing_since_ ABSL_GUARDED_BY(mutex_) = 0;
  std::deque<OutgoingMessage> queue_ ABSL_GUARDED_BY(mutex_);
  grpc::Status end_status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace structkv::rpc
