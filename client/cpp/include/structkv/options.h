// Options of the client and of its sessions. Every field has a default that works.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "grpcpp/security/credentials.h"
#include "structkv/bytes.h"
#include "structkv/replica.h"
#include "structkv/result.h"

namespace structkv::client {

class Arena;    // arena.h
class NcclGpu;  // nccl.h
class Region;   // region.h

// When a prompt is tried again. Tried again are UNAVAILABLE, and RESOURCE_EXHAUSTED where the
// server says when (`grpc-retry-pushback-ms`); nothing once the first result has arrived.
struct RetryPolicy {
  // Attempts in all; 1: never again. Of several replicas an attempt is one at each that may take
  // the prompt, without a wait in between.
  int max_attempts = 4;
  // Wait before the second attempt; each further one waits `multiplier` times longer, at most
  // `max_backoff`, with up to a fifth of jitter. A server's pushback takes its place.
  absl::Duration initial_backoff = absl::Milliseconds(100);
  absl::Duration max_backoff = absl::Seconds(5);
  double multiplier = 2.0;
};

// How long the server asks to wait before what it refused with `status` is tried again; nullopt:
// it does not say, or never.
std::optional<absl::Duration> RetryAfter(const absl::Status& status);

struct ClientOptions {
  // Null: an unencrypted channel.
  std::shared_ptr<grpc::ChannelCredentials> credentials;
  // Sent with every call as `authorization: Bearer TOKEN` (docs/security.md); empty: none. Without
  // `credentials` only to unix sockets and this host's own addresses. Of a client that Connect()
  // makes.
  std::string token;
  // Memory of dropped results that is kept for the next ones: the first touch of fresh pages costs
  // more than a copy.
  size_t idle_buffer_bytes = size_t{256} << 20;
  // How often an idle connection is probed; infinite: never. A server refuses probes that come more
  // often than it allows.
  absl::Duration keepalive_interval = absl::InfiniteDuration();
  // Goes before gRPC's own user agent.
  std::string user_agent = "structkv-client";
  // The server is one of this program's own, and the channel leads nowhere else, as one of
  // Server::PrivateChannel() does: regions of a GPU are named to it by their addresses, since CUDA
  // opens nothing in the process that made it, and by ProcessId(). Who knows that can have this
  // process's GPU memory read and written, so never of another server.
  bool own_process = false;
  // Of a client whose target stands for several servers.
  ReplicaOptions replicas;
};

// Gives the memory for one tensor of a layer's result: `size` bytes that stay valid as long as the
// `Bytes` do. An error ends the session, or the fetch, with it; fewer bytes are RESOURCE_EXHAUSTED.
// Called on a library thread.
using ResultAllocator =
    std::function<absl::StatusOr<Bytes>(uint32_t layer, v1::Tensor tensor, size_t size)>;

// The rows that a pull asks for, [kv_heads, kept_tokens, dim] or the layout of `Open`: row i of
// head h is the token positions[i] or, selected per KV head, positions[h * kept_tokens + i].
struct PulledRows {
  absl::Span<const std::byte> keys;  // empty unless asked for
  absl::Span<const std::byte> values;
  // Keeps both alive; released when the transport is done with them. Null: they are copied.
  std::shared_ptr<const void> owner;
};
using RowSource = std::function<absl::StatusOr<PulledRows>(const RowPull&)>;

// Where the tensors of a stream lie (docs/transports.md).
enum class TransportChoice : uint8_t {
  // The best that there is. With regions of the host: shared memory, else inline. With regions of a
  // GPU: CUDA IPC, else NCCL where StreamOptions.nccl is set, else what copy_from_gpu lets, else an
  // error with the reasons. Without regions inline, and likewise with regions of the host where the
  // client chooses between several replicas. `Opened.transport_reason` says why not a better one.
  kAuto,
  // In messages.
  kInline,
  // In memory of the host that the server has mapped as well. What does not grant it is an error;
  // so it is of those below.
  kSharedMemory,
  // In memory of a GPU that the server has opened.
  kCudaIpc,
  // From GPU to GPU, by the pair of StreamOptions.nccl.
  kNccl,
};

// By what the server's log, status page and traces name a call (docs/operations.md). Sent with
// every attempt; what is empty is not.
struct CallLabels {
  // The caller's own name for it: 1 to 128 letters, digits and "._:/+@-". Others the server
  // refuses.
  std::string session_id;
  // W3C Trace Context of the caller's span, as it is.
  std::string traceparent;
  std::string tracestate;
};

// Of a stream: what the prompts of a batch have in common.
struct StreamOptions {
  // From the first attempt to the last answer. Infinite: the server's own cap alone.
  absl::Duration timeout = absl::InfiniteDuration();
  // Tensor bytes per message, cut to the server's limit.
  size_t chunk_bytes = size_t{2} << 20;
  // Tensor bytes that may wait to be sent before Send() blocks; one message always may.
  size_t max_in_flight_bytes = size_t{16} << 20;
  // Result bytes that may wait to be read before the library stops reading the stream. 0: no bound.
  // With a bound, read results on another thread than the one that sends, and those of every prompt
  // of a batch as they come: a stream that is read too late stalls, and the server ends it as
  // ABORTED.
  size_t max_buffered_result_bytes = 0;
  // Send an XXH3 checksum with every piece whose data are in a message.
  bool checksums = false;
  RetryPolicy retry;
  // Of several replicas: the address of the one to use, whatever the target stands for. Empty: the
  // client chooses.
  std::string replica;
  TransportChoice transport = TransportChoice::kAuto;
  // The regions that keys and values lie in, all of the host's memory or all of one GPU's. They are
  // registered with the server where they are not, also after it was restarted. At most 64,
  // `staging` and PromptOptions.results among them.
  std::vector<std::shared_ptr<Region>> regions;
  // Keys and values that lie outside of the regions, and pulled rows, are copied to it until their
  // layer was answered. Sending waits for answers where it is full. Null: they are refused.
  std::shared_ptr<Arena> staging;
  // For NCCL: the GPU that the regions are of, which is attached to the server where it is not. The
  // regions are not registered for it; keys and values may lie anywhere in the GPU's memory, and
  // kept rows of the output COMPACT need PromptOptions.results.
  std::shared_ptr<NcclGpu> nccl;
  // With regions of a GPU: where no transport can read them, keys and values are copied to the
  // host's memory and travel inline, and results are copied to PromptOptions.results. False: that
  // is FAILED_PRECONDITION, with the reasons, since it is many times slower.
  bool copy_from_gpu = false;
  // Sent as gRPC metadata with every attempt.
  std::vector<std::pair<std::string, std::string>> metadata;
  CallLabels labels;
};

// Of one prompt. The functions are called on a library thread, and the stream is not read further
// while one runs, for no prompt of it. They must not destroy a session of the stream.
struct PromptOptions {
  // Where results go; null: memory from the client's pool.
  ResultAllocator allocate;
  // With regions and the output COMPACT: kept keys and values of all layers are written here by the
  // server, into one block that LayerResult.keys and .values share; of a GPU these are addresses
  // there. RESOURCE_EXHAUSTED where it has no room for that. Null: they come in messages.
  std::shared_ptr<Arena> results;
  // With `Open.pull`: gives the rows that the server asks for. An error ends the session with it.
  // Null: they are taken from the tensors that SendLayer() was given.
  RowSource rows;
  // Called when an attempt was admitted, before any event, and before the session is there to send
  // anything.
  std::function<void(const v1::Opened&)> on_opened;
  // Takes the events as they arrive, one at a time, in place of NextEvent().
  std::function<void(Event)> on_event;
  // Called once for each event but the summary, when NextEvent() has it; for the summary, and for a
  // failure, on_end is called. Not with on_event.
  std::function<void()> on_ready;
  // Called once for each attempt, when it is over and after its last event, with what it ended
  // with; by the thread that cancels or drops a session where that is what ends it.
  std::function<void(const absl::Status&)> on_end;
};

// Of a session that has its stream to itself.
struct SessionOptions : StreamOptions, PromptOptions {};

// One prompt of several in one stream.
struct BatchPrompt {
  v1::Open open;
  PromptOptions options;
};

}  // namespace structkv::client
