// The writing side of a server-streaming call of gRPC's callback API, made safe to end from any
// thread. Holds one message at a time: the next one is made when the one before has left, or, where
// that waits for something else, once the stream is woken.
//
// gRPC's rules are those of stream_io.h: one write outstanding, exactly one Finish, nothing started
// after it. One thread at a time decides and starts (`busy_`); one that finds another at it leaves,
// and the other looks again.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "service/rpc/write_step.h"

namespace structkv::rpc {

class WriteStream : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                    public std::enable_shared_from_this<WriteStream> {
 public:
  // `context` lives until gRPC's last reaction.
  explicit WriteStream(grpc::CallbackServerContext* context) : context_(context) {}

 protected:
  // Makes the next message, or ends the stream; not called after the last one.
  virtual absl::StatusOr<WriteStep> Next() = 0;
  // The call broke or was cancelled. Perhaps more than once, perhaps after the end.
  virtual void OnBroken() = 0;
  // gRPC's last reaction.
  virtual void OnGone() = 0;

  // Keeps this object alive until gRPC is done with it. Call once, before returning it to gRPC.
  void HoldSelf() { self_ = shared_from_this(); }
  // Writes or, after EndWith(), ends.
  void Advance();
  // What Next() waits for has come, or comes meanwhile.
  void Wake();
  // Ends the stream with an error. False where its end was decided before.
  bool EndWith(const grpc::Status& status);

  // How the stream ended; OK where it has not.
  grpc::Status end_status() const;
  // When the outstanding write, or the end, was started, in SteadyNanos(); 0 where there is none.
  int64_t writing_since() const;

  grpc::CallbackServerContext* context() const { return context_; }

 private:
  void OnWriteDone(bool ok) final;
  void OnCancel() final { OnBroken(); }
  void OnDone() final;

  grpc::CallbackServerContext* const context_;
  std::shared_ptr<WriteStream> self_;
  WriteStep outgoing_;  // the outstanding write's

  mutable absl::Mutex mutex_;
  bool busy_ ABSL_GUARDED_BY(mutex_) = false;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool woken_ ABSL_GUARDED_BY(mutex_) = false;     // since Next() was called
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;    // with end_status_
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;  // Finish or StartWriteAndFinish was decided
  bool gone_ ABSL_GUARDED_BY(mutex_) = false;      // OnDone was called
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t writing_since_ ABSL_GUARDED_BY(mutex_) = 0;
  grpc::Status end_status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace structkv::rpc
