// One prompt on its way through the service.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "structkv/options.h"
#include "structkv/result.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::client {

namespace internal {
class SessionCore;
}  // namespace internal

// One layer's tensors, each whole; empty where the prompt has no such tensor. What is pulled
// (`Open.pull`) is not sent: without PromptOptions.rows it is whole here as well, and its rows are
// copied out of it when the server asks for them.
struct LayerTensors {
  absl::Span<const std::byte> keys;
  absl::Span<const std::byte> values;
  absl::Span<const std::byte> window_queries;
  absl::Span<const std::byte> window_lse;
  absl::Span<const std::byte> saliency;
  absl::Span<const std::byte> key_scales;
  absl::Span<const std::byte> value_scales;
  // Not empty: the layer holds skeleton rows alone, and this is PivotResult.skeleton. Keys, values
  // and saliency then have its tokens in place of N. From PivotResult.skeleton_from_layer on.
  // Always copied.
  absl::Span<const int32_t> positions;
  // Keeps all of them alive; released when the transport is done with them: when they were sent or,
  // of what lies in a region, when the layer was answered, before its result is handed on. Null:
  // they are copied, but for what lies in a region, which must stay as it is until the layer was
  // answered.
  std::shared_ptr<const void> owner;
  // With regions of a GPU: the cudaStream_t on which the layer's tensors are written; nothing needs
  // to have run yet (Region::Record). Unset: they are written, or the caller has recorded it.
  std::optional<void*> cuda_stream;
};

// Consecutive tokens of one layer's keys and values, as chunked prefill computes them: each dense,
// in the layout of `Open`, with the chunk's tokens in place of N. Empty where the prompt has no
// such tensor.
struct ChunkTensors {
  absl::Span<const std::byte> keys;
  absl::Span<const std::byte> values;
  // As in LayerTensors.
  std::shared_ptr<const void> owner;
};

// A session that the server has admitted. Made by Client::OpenPrompt, with a stream of its own, or
// by Client::OpenBatch, where several share one.
//
// Errors: every call on a failed session returns the status that it failed with, which is the
// server's code and text where the server ended it. What a server sends against the protocol is
// DATA_LOSS.
//
// Batches: each session runs as it would alone, and is over with its own summary or failure; the
// order in which the prompts' calls come is free. One that fails, is cancelled or is dropped leaves
// the others as they are: the server is told at once, so that it gives the prompt's memory back.
// The stream ends with the last of them; a message that cannot be read, a lost connection and the
// limits of time end all. The bounds of StreamOptions are those of all prompts together.
//
// Pull: the session answers the server's pulls by itself, on a library thread. A layer is held open
// until its rows were sent, so SendLayer(), Send() and SendChunk() block for a layer that is
// `layers_in_flight` ahead of one that waits, and Commit() for the last rows. Read results
// meanwhile, or leave `StreamOptions.max_buffered_result_bytes` unbounded.
//
// Shared memory (`opened().transport()`): keys and values are whole, in one of
// StreamOptions.regions and from a multiple of 64 bytes of it on, or are copied to
// StreamOptions.staging; without that, INVALID_ARGUMENT names the tensor. A session that fails or
// is cancelled may leave the server reading, or writing a result, for a moment: results' memory is
// given out again once the server says that it has let go.
//
// Threads: one thread may send (Send, SendLayer, Commit) while another reads (NextEvent, Collect,
// Wait); Cancel may be called from any. The library reads the stream all the while, so a single
// thread that sends everything first and reads afterwards does not deadlock. Sessions of a batch
// may be used by the same threads or by different ones.
class CompressSession {
 public:
  // Cancels the session if it still runs, and waits until no function of its options can be called
  // any more; the last one of a stream also until the library has let go of that.
  ~CompressSession();
  CompressSession(const CompressSession&) = delete;
  CompressSession& operator=(const CompressSession&) = delete;

  // What was asked for, with the idempotency key in force.
  const v1::Open& open() const;
  // What the server answered.
  const v1::Opened& opened() const;
  // The address of the server that has the prompt; empty where the client was given a channel.
  const std::string& replica() const;

  // Sends bytes of a tensor, cut into messages. Blocks while too many bytes wait to be sent. The
  // data are copied; with an `owner`, which keeps them alive until the transport has let go of
  // them, they are not. Over shared memory as SendLayer(), keys and values whole.
  absl::Status Send(uint32_t layer, v1::Tensor tensor, absl::Span<const std::byte> data,
                    uint64_t offset_bytes = 0, const std::shared_ptr<const void>& owner = nullptr);

  // Sends all tensors of a layer, small ones together in one message; positions, where it has them,
  // first. With `Open.pull` and without PromptOptions.rows, `tensors.owner` keeps what is pulled
  // alive until its rows were copied; where it is null, the call waits for that. INVALID_ARGUMENT
  // where what may be pulled has another size than the whole tensor.
  absl::Status SendLayer(uint32_t layer, const LayerTensors& tensors);

  // Sends the keys and values of tokens [first_token, first_token + tokens) of a full layer; with
  // [kv_head, token, dim] that is a piece for each KV head. The layer's other tensors go by Send or
  // SendLayer, at any time. INVALID_ARGUMENT where the tokens leave the prompt, or a tensor has
  // another size than theirs, or they are paged (Send takes whole blocks), or the transport is
  // shared memory (there a chunk is written into its place in the tensor, and SendLayer sends
  // that).
  absl::Status SendChunk(uint32_t layer, uint32_t first_token, uint32_t tokens,
                         const ChunkTensors& chunk);

  // Ends the prompt: says how many layers and bytes were sent. FAILED_PRECONDITION where that was
  // done before.
  absl::Status Commit();

  // Waits for the next event. After the summary: OUT_OF_RANGE. FAILED_PRECONDITION where
  // `PromptOptions.on_event` takes the events.
  absl::StatusOr<Event> NextEvent();

  // Reads all that is left and puts it in order.
  absl::StatusOr<Compressed> Collect();

  // Waits for the end of the session. Events that were not read stay to be read.
  absl::StatusOr<v1::Summary> Wait();

  // Ends the session as CANCELLED, without waiting. Events that were not read are dropped.
  void Cancel();

 private:
  friend class Client;
  explicit CompressSession(std::unique_ptr<internal::SessionCore> core);
  std::unique_ptr<internal::SessionCore> core_;
};

}  // namespace structkv::client
