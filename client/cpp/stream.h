// A Compress call: writes that are queued within a bound, reads that never wait for writes, and one
// end. It carries one prompt or several, and hands each the messages that are its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/client_callback.h"
#include "structkv/options.h"
#include "structkv/v1/piece_codec.h"

namespace structkv::client::internal {

class SessionCore;

// Thread-safe. Prompts are named by their place in what Start() was given. Once started, every
// session must have been detached before it is destroyed, which must not happen on one of gRPC's
// threads: with the last reference to a channel such a thread would wait for itself.
//
// gRPC's completion callbacks may run on the thread that starts an operation, and starting one may
// release a caller's buffers: no operation is started under the mutex. A hold keeps the call alive
// while another thread than gRPC's may start one. Sessions are called without the mutex, by one of
// gRPC's threads at a time.
class Stream final : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  // `options.replica`: the server's address. `names_replica`: whether errors give it.
  Stream(StreamOptions options, bool names_replica)
      : options_(std::move(options)), names_replica_(names_replica) {}

  // Starts the call, and sends each session's `open`. Called once.
  void Start(std::shared_ptr<grpc::Channel> channel, absl::Time deadline,
             const std::vector<SessionCore*>& sessions);

  // Queues a message of a prompt with `bytes` of tensor data; blocks while too many wait. False
  // where nothing can be sent of the prompt any more: the stream or the session is over, or its
  // last message was queued.
  bool Write(uint32_t prompt, const grpc::ByteBuffer& message, size_t bytes);
  // Likewise, without ever waiting. `last`: of the prompt. The call is half-closed with the last
  // message of all.
  bool WriteNow(uint32_t prompt, const grpc::ByteBuffer& message, size_t bytes, bool last = false);

  // Counts result bytes that wait to be read, and that do so no longer.
  void AddUnread(size_t bytes);
  void RemoveUnread(size_t bytes);

  // The session wants nothing more. Has the server drop the prompt; with the last one that wants
  // anything, cancels the call.
  void Abandon(uint32_t prompt);
  // Likewise, and returns once the session is not called any more; for the last session, once no
  // callback can run any more.
  void Detach(uint32_t prompt);

  const StreamOptions& options() const { return options_; }
  // Whose errors they are, for their texts; empty: of the only server.
  std::string origin() const { return names_replica_ ? options_.replica : ""; }

 private:
  struct Outgoing {
    std::optional<grpc::ByteBuffer> message;  // none: a half-close alone
    size_t bytes = 0;
    bool last = false;  // half-closes
  };

  struct Prompt {
    SessionCore* session = nullptr;  // null once detached
    bool sending = true;             // its last message was not queued yet
    bool wanted = true;              // neither over nor abandoned
    bool over = false;               // its last message came
  };

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnWritesDoneDone(bool ok) override { OnWriteDone(ok); }
  void OnDone(const grpc::Status& status) override;

  void Dispatch(wire::Response response);
  // Calls `call` with the prompt's session, where it is not detached.
  template <typename Call>
  void With(uint32_t prompt, Call call);
  // The server's fault, and so the end of all.
  void Fail(absl::Status status);
  void Cancel();

  // Queues a message, or (none) nothing but the prompt's end. The front one, where it is to be
  // started.
  Outgoing* Enqueue(Prompt& prompt, std::optional<grpc::ByteBuffer> message, size_t bytes,
                    bool last) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool CanSend(const Prompt& prompt) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Starts what Enqueue() has returned; may be null.
  void StartQueued(Outgoing* front);
  void StartFront(Outgoing* front);
  // Ends an operation that another thread than gRPC's has started.
  void DoneStarting();
  bool HoldIsOver() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const StreamOptions options_;
  const bool names_replica_;
  std::shared_ptr<grpc::Channel> channel_;
  grpc::ClientContext context_;
  grpc::ByteBuffer incoming_;

  mutable absl::Mutex mutex_;
  absl::CondVar changed_;
  std::vector<Prompt> prompts_ ABSL_GUARDED_BY(mutex_);
  size_t sending_ ABSL_GUARDED_BY(mutex_) = 0;  // prompts, by the flags above
  size_t wanted_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t running_ ABSL_GUARDED_BY(mutex_) = 0;  // not over
  size_t attached_ ABSL_GUARDED_BY(mutex_) = 0;
  std::optional<uint32_t> called_ ABSL_GUARDED_BY(mutex_);  // the prompt whose session is called
  std::deque<Outgoing> queue_ ABSL_GUARDED_BY(mutex_);      // the front one is being written
  size_t in_flight_ ABSL_GUARDED_BY(mutex_) = 0;            // bytes
  size_t unread_ ABSL_GUARDED_BY(mutex_) = 0;               // bytes
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool paused_ ABSL_GUARDED_BY(mutex_) = false;  // no read is outstanding
  int starting_ ABSL_GUARDED_BY(mutex_) = 0;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;  // no operation is started any more
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  bool hold_released_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status fault_ ABSL_GUARDED_BY(mutex_);
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace structkv::client::internal
