// One prompt behind a session: what was sent of it, its results, its pulls and its end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "client/cpp/assembler.h"
#include "client/cpp/bytes_pool.h"
#include "client/cpp/prompt_transfers.h"
#include "client/cpp/result_places.h"
#include "client/cpp/sent_ranges.h"
#include "client/cpp/stream.h"
#include "client/cpp/transport_choice.h"
#include "grpcpp/support/byte_buffer.h"
#include "structkv/options.h"
#include "structkv/result.h"
#include "structkv/session.h"
#include "structkv/v1/compression.pb.h"
#include "structkv/v1/piece_codec.h"

namespace structkv::client::internal {

// Thread-safe. Calls its stream without its own mutex.
class SessionCore final {
 public:
  // Prompt number `prompt` of `stream`, which must have been started with it before anything else
  // is called.
  // `place`: what its `Open` offers beside messages.
  SessionCore(BatchPrompt prompt, SharedPlace place, std::shared_ptr<BytesPool> pool,
              std::shared_ptr<Stream> stream, uint32_t index);
  // As Stream::Detach().
  ~SessionCore();

  // Waits until the server has answered; the session's status where it ended before it was opened.
  absl::Status WaitOpened();

  // Queues a message with `bytes` of tensor data; blocks while too many wait.
  absl::Status Write(const grpc::ByteBuffer& message, size_t bytes);
  // Likewise, without ever waiting. CANCELLED where nothing can be sent any more.
  absl::Status WriteNow(const grpc::ByteBuffer& message, size_t bytes);
  // FAILED_PRECONDITION after a commit.
  absl::Status CheckSending() const;
  absl::Status Commit();
  // Before a layer of skeleton rows is sent: its answer may come while it is.
  void NoteSkeletonLayer(uint32_t layer);
  void NoteSent(uint32_t layer, int tensor, uint64_t begin, uint64_t end);

  // Where tensors lie in regions, after WaitOpened() has returned OK; null: they go in messages.
  const SharedPlace* shared_place() const {
    return InRegions(opened_.transport()) ? &place_ : nullptr;
  }
  // Whether keys and values alone are named where they lie.
  bool names_rows_alone() const { return opened_.transport() == v1::TRANSPORT_CUDA_IPC; }
  // Whether keys and values go by the NCCL pair, after WaitOpened() has returned OK.
  bool transfers() const { return opened_.transport() == v1::TRANSPORT_NCCL; }
  // Offers a layer's keys and values once all of them were named; the key that names them.
  absl::StatusOr<std::string> Transfer(uint32_t layer, v1::Tensor tensor,
                                       absl::Span<const std::byte> data,
                                       const std::shared_ptr<const void>& owner);
  // What copies from and to the GPU in whose memory tensors may lie; null: all lie in the host's.
  const GpuMemory* gpu() const { return place_.gpu.get(); }
  // Likewise with the event that is recorded behind `data`.
  std::shared_ptr<const GpuMemory> GpuOf(absl::Span<const std::byte> data) const;
  // Has the server, and copies, wait for what was queued on `stream`, where that is set.
  absl::Status Record(const std::optional<void*>& stream) const;
  // `data` of a GPU in the host's memory.
  absl::StatusOr<Bytes> CopyToHost(absl::Span<const std::byte> data) const;
  // Keeps `owner` until the layer was answered. Before the layer is sent.
  void HoldUntilAnswered(uint32_t layer, std::shared_ptr<const void> owner);
  // A block of the staging arena. Where that is full, and `wait`, waits for answers that make room,
  // and 10 seconds for those of other sessions.
  //   INVALID_ARGUMENT    there is no staging arena
  //   RESOURCE_EXHAUSTED  no answer that is due makes room
  //   and what the session ended with
  absl::StatusOr<Bytes> AllocateStaging(size_t size, bool wait);

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

  // From the stream, one call at a time:
  void OnMessage(wire::Response response);
  // Nothing follows. With OK the summary came, or should have.
  void OnEnd(absl::Status status);

  uint32_t index() const { return index_; }
  const v1::Open& open() const { return open_; }
  const PromptOptions& options() const { return options_; }
  const StreamOptions& stream_options() const { return stream_->options(); }
  // After WaitOpened() has returned OK.
  const v1::Opened& opened() const { return opened_; }

 private:
  // A layer that was sent, whose rows the server has not asked for yet.
  struct Held {
    LayerTensors tensors;
    std::vector<int32_t> positions;  // of a layer of skeleton rows
  };

  // With transfers (see transfer_session.cc):
  // An event in its turn: layers wait for their rows.
  void DeliverInTurn(Event event);
  // Delivers what is due, on the pair's thread.
  void DeliverArrived();
  // What OnEnd() does once nothing is due any more.
  void End(absl::Status status);
  // Copies rows that came in a message to PromptOptions.results, where that is memory of a GPU.
  absl::Status CopyToResults(LayerResult* layer) const;
  void AnswerPull(const RowPull& pull);
  absl::StatusOr<PulledRows> RowsFor(const RowPull& pull);
  // Whether everything was sent that the layer's answer needs, but for what is pulled.
  bool IsSent(uint32_t layer) const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  // Whether answers are due that let go of memory.
  bool RoomIsDue() const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  // Layers that were sent and wait for their rows.
  bool RowsAreDue() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool IsSkeletonLayer(uint32_t layer) const;
  // Lets go of what was held for a layer.
  void ReleaseHeld(uint32_t layer);
  void Deliver(Event event);
  // Ends the session on this side, unless it has ended.
  void Fail(const absl::Status& status);
  // Says how the session ended. False where that was said before.
  bool Settle(absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The last step of an end.
  void Finish();
  void DropEvents();
  // Waits for the end. Why nothing can be sent.
  absl::Status EndedStatus() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // An event that waits for its turn, and maybe for its rows.
  struct Arriving {
    Event event;
    bool arrived = true;
  };
  // Keys and values of a layer that are not all named yet.
  struct Leaving {
    absl::Span<const std::byte> keys;
    absl::Span<const std::byte> values;
    std::vector<std::shared_ptr<const void>> owners;
  };

  const v1::Open open_;
  const PromptOptions options_;
  const SharedPlace place_;
  const std::shared_ptr<BytesPool> pool_;
  const std::shared_ptr<Stream> stream_;
  const uint32_t index_;
  Assembler assembler_;  // used by calls from the stream alone
  v1::Opened opened_;
  const std::shared_ptr<PromptTransfers> transfers_;  // null: no pair is offered

  mutable absl::Mutex mutex_;
  absl::CondVar changed_;
  absl::CondVar answered_more_;  // `answered_` has grown, or the end: not for who waits for events
  bool opened_set_ ABSL_GUARDED_BY(mutex_) = false;
  bool committed_ ABSL_GUARDED_BY(mutex_) = false;
  SentRanges sent_ ABSL_GUARDED_BY(mutex_);
  std::set<uint32_t> skeleton_layers_ ABSL_GUARDED_BY(mutex_);
  std::map<uint32_t, Held> held_ ABSL_GUARDED_BY(mutex_);
  std::set<uint32_t> rows_queued_ ABSL_GUARDED_BY(mutex_);    // layers
  uint32_t lowest_without_rows_ ABSL_GUARDED_BY(mutex_) = 0;  // layer
  // By layer, until it was answered.
  std::multimap<uint32_t, std::shared_ptr<const void>> owners_ ABSL_GUARDED_BY(mutex_);
  std::set<uint32_t> answered_ ABSL_GUARDED_BY(mutex_);  // layers
  std::map<uint32_t, Leaving> leaving_ ABSL_GUARDED_BY(mutex_);
  std::deque<std::shared_ptr<Arriving>> arriving_ ABSL_GUARDED_BY(mutex_);
  bool ends_well_ ABSL_GUARDED_BY(mutex_) = false;  // once all have arrived
  std::deque<Event> events_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Status> status_ ABSL_GUARDED_BY(mutex_);  // set by Settle()
  bool done_ ABSL_GUARDED_BY(mutex_) = false;                   // set by Finish()
  std::optional<v1::Summary> summary_ ABSL_GUARDED_BY(mutex_);  // where the status is OK
  bool summary_taken_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace structkv::client::internal
