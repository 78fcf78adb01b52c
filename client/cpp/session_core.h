// The stream behind a session: writes that are queued within a bound, reads that never wait for
// writes, and one end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/cpp/assembler.h"
#include "client/cpp/bytes_pool.h"
#include "client/cpp/sent_ranges.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/client_callback.h"
#include "structkv/options.h"
#include "structkv/result.h"
#include "structkv/session.h"

namespace structkv::client::internal {

// Thread-safe. Once started, Close() must have returned before it is destroyed, and it must not be
// destroyed on one of gRPC's threads: with the last reference to a channel such a thread would wait
// for itself.
//
// gRPC's completion callbacks may run on the thread that starts an operation, and starting one may
// release a caller's buffers: no operation is started under the mutex. A hold keeps the call alive
// while another thread than gRPC's may start one.
class SessionCore final : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  SessionCore(v1::Open open, SessionOptions options, std::shared_ptr<BytesPool> pool);

  // Starts the stream and sends `open`. Called once.
  void Start(std::shared_ptr<grpc::Channel> channel, absl::Time deadline);

  // Waits until the server has answered; the stream's status where it ended before that.
  absl::Status WaitOpened();
  // After it: lets events come to `SessionOptions.on_event`.
  void StartEvents();

  // Queues a message with `bytes` of tensor data; blocks while too many wait. `last`: half-closes
  // after it.
  absl::Status Write(const grpc::ByteBuffer& message, size_t bytes, bool last);
  // Likewise, without ever waiting. CANCELLED where the stream has ended.
  absl::Status WriteNow(const grpc::ByteBuffer& message, size_t bytes);
  // FAILED_PRECONDITION after a commit.
  absl::Status CheckSending() const;
  absl::Status Commit();
  // Before a layer of skeleton rows is sent: its answer may come while it is.
  void NoteSkeletonLayer(uint32_t layer);
  void NoteSent(uint32_t layer, int tensor, uint64_t begin, uint64_t end);

  // With `Open.pull` (see pull_session.cc):
  bool pulls() const;
  bool pulls(v1::Tensor tensor) const;
  // Keeps what is to be pulled of a layer. Before the layer is sent: its pull may come while it is.
  absl::Status HoldForPull(uint32_t layer, const LayerTensors& tensors);
  // Waits until the layer lies within the window that layers waiting for their rows leave open.
  absl::Status WaitForWindow(uint32_t layer);
  // Waits until the layer's rows were queued.
  absl::Status WaitForRows(uint32_t layer);

  absl::StatusOr<Event> NextEvent();
  absl::StatusOr<v1::Summary> Wait();
  void Cancel();
  // Cancels what still runs, and waits until no callback can run any more.
  void Close();

  const v1::Open& open() const { return open_; }
  const SessionOptions& options() const { return options_; }
  // After WaitOpened() has returned OK.
  const v1::Opened& opened() const { return opened_; }
  // After the end: when the server said to try again; negative: not at all.
  std::optional<int64_t> retry_pushback_millis() const;

 private:
  struct Outgoing {
    grpc::ByteBuffer message;
    size_t bytes = 0;
    bool last = false;
  };

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

  // A layer that was sent, whose rows the server has not asked for yet.
  struct Held {
    LayerTensors tensors;
    std::vector<int32_t> positions;  // of a layer of skeleton rows
  };

  // Queues a message; the front one, where it is to be started.
  Outgoing* Enqueue(const grpc::ByteBuffer& message, size_t bytes, bool last)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status EndedStatus() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void AnswerPull(const RowPull& pull);
  absl::StatusOr<PulledRows> RowsFor(const RowPull& pull);
  // Layers that were sent and wait for their rows.
  bool RowsAreDue() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void StartFront(Outgoing* front);
  // Hands an event on. False: the reader is behind, stop reading.
  bool Deliver(Event event);
  void Fail(absl::Status status);
  // Ends an operation that another thread than gRPC's has started.
  void DoneStarting();
  bool HoldIsOver() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool IsSkeletonLayer(uint32_t layer) const;
  absl::Status FinalStatus() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const v1::Open open_;
  const SessionOptions options_;
  const std::shared_ptr<BytesPool> pool_;
  std::shared_ptr<grpc::Channel> channel_;
  grpc::ClientContext context_;
  grpc::ByteBuffer incoming_;
  Assembler assembler_;  // used by gRPC's callbacks alone, which do not overlap
  v1::Opened opened_;

  mutable absl::Mutex mutex_;
  absl::CondVar changed_;
  std::deque<Outgoing> queue_ ABSL_GUARDED_BY(mutex_);  // the front one is being written
  size_t in_flight_ ABSL_GUARDED_BY(mutex_) = 0;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool committed_ ABSL_GUARDED_BY(mutex_) = false;
  int starting_ ABSL_GUARDED_BY(mutex_) = 0;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;  // no operation is started any more
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  bool hold_released_ ABSL_GUARDED_BY(mutex_) = false;
  bool opened_set_ ABSL_GUARDED_BY(mutex_) = false;
  bool paused_ ABSL_GUARDED_BY(mutex_) = false;
  std::deque<Event> events_ ABSL_GUARDED_BY(mutex_);
  size_t buffered_ ABSL_GUARDED_BY(mutex_) = 0;
  SentRanges sent_ ABSL_GUARDED_BY(mutex_);
  std::set<uint32_t> skeleton_layers_ ABSL_GUARDED_BY(mutex_);
  std::map<uint32_t, Held> held_ ABSL_GUARDED_BY(mutex_);
  std::set<uint32_t> rows_queued_ ABSL_GUARDED_BY(mutex_);    // layers
  uint32_t lowest_without_rows_ ABSL_GUARDED_BY(mutex_) = 0;  // layer
  absl::Status local_error_ ABSL_GUARDED_BY(mutex_);
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  std::optional<v1::Summary> summary_ ABSL_GUARDED_BY(mutex_);
  bool summary_taken_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<int64_t> pushback_millis_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace structkv::client::internal
