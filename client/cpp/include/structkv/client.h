// Client of the StructKV compression service.
//
//   auto client = structkv::client::Client::Connect("localhost:7411");
//   auto session = (*client)->OpenPrompt(open);
//   for (layer ...) (*session)->SendLayer(layer, tensors);
//   (*session)->Commit();
//   auto compressed = (*session)->Collect();
//
// compress.h has the same in one call. Programs that move many gigabytes should keep glibc's malloc
// from giving pages back, which makes streams up to 2.9 times faster; it is a property of the whole
// process, so it is theirs to set:
//   mallopt(M_MMAP_THRESHOLD, 1 << 30); mallopt(M_TRIM_THRESHOLD, 1 << 30);
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "grpcpp/channel.h"
#include "structkv/held_cache.h"
#include "structkv/options.h"
#include "structkv/region.h"
#include "structkv/replica.h"
#include "structkv/session.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::client {

namespace internal {
class BytesPool;
class ReplicaSet;
struct Replica;
}  // namespace internal

// Thread-safe. Sessions may outlive the client. One client is one connection to each server; for
// more throughput from several threads, give each its own.
class Client {
 public:
  // `target` is one server, "host:port" or "unix:/path" or another of gRPC's names, or stands for
  // several that do the same (docs/protocol.md, "Several replicas"): addresses with commas between
  // them, or "dns:///name:port", which is all addresses of the name. Each prompt goes to one of
  // them. Connects with the first call. INVALID_ARGUMENT where an address is empty or a name has no
  // port, and for a token that ClientOptions does not allow.
  static absl::StatusOr<std::unique_ptr<Client>> Connect(const std::string& target,
                                                         const ClientOptions& options = {});
  // Uses a channel that exists. It must not compress messages, and must accept messages of
  // `Open.max_response_message_bytes`.
  explicit Client(std::shared_ptr<grpc::Channel> channel, const ClientOptions& options = {});
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  // What the server can do; of several replicas one that is ready.
  absl::StatusOr<v1::GetCapabilitiesResponse> GetCapabilities(
      absl::Duration timeout = absl::Seconds(10));

  // Registers `region` with the server, for the streams of `tenant`, unless it is registered.
  // Opening a prompt does so by itself; this says early, and to a person, why it cannot be.
  //   UNIMPLEMENTED        the server has no shared memory
  //   UNAVAILABLE          the server, or the region socket that it names, cannot be reached: it
  //   was
  //                        stopped, or runs on another host
  //   FAILED_PRECONDITION  a region of kind kNamed, whose one registration is over
  //   or what the server says (region.proto)
  // Of a client with several replicas: FAILED_PRECONDITION, since a region is registered with the
  // one that its prompt goes to.
  absl::Status Register(Region& region, const std::string& tenant = "");

  // Where `open` would go now, of several replicas: for ranks of a shard group that are told where
  // to meet (StreamOptions.replica). Errors as OpenPrompt() has them where none can take it.
  absl::StatusOr<std::string> ChooseReplica(const v1::Open& open,
                                            absl::Duration timeout = absl::Seconds(10));
  // What is known of the replicas, in the order of their addresses; of those of a name nothing
  // before the first call.
  std::vector<ReplicaState> Replicas() const;

  // Opens a stream, sends `open` and waits until the server has admitted it, trying again as
  // `options.retry` says. An empty idempotency key is filled in, so that an attempt takes the place
  // of the one before at the same server.
  absl::StatusOr<std::unique_ptr<CompressSession>> OpenPrompt(const v1::Open& open,
                                                              const SessionOptions& options = {});

  // Opens several prompts in one stream (docs/protocol.md, "Batches"), for an engine that prefills
  // them together: their lengths, methods and types need not agree. Waits until each was admitted
  // or refused, and returns what OpenPrompt would, in the order of `prompts`.
  //
  // A prompt that is refused leaves the others as they are. Prompts that may be tried again are,
  // all together, unless one was admitted: it may hold the room that they wait for, so they are
  // returned with their status, and RetryAfter() of it says when to open them on another stream.
  // What the stream itself fails with is the status of every prompt. `batch_prompt_count` is filled
  // in, and so are empty idempotency keys. Of several replicas a batch goes to one, that of its
  // first prompt.
  std::vector<absl::StatusOr<std::unique_ptr<CompressSession>>> OpenBatch(
      absl::Span<const BatchPrompt> prompts, const StreamOptions& options = {});

  // Fetches a held cache (held_cache.h), or some of its layers and heads, and waits for it. What
  // breaks on the way is gone on with. What a server sends against the protocol is DATA_LOSS; the
  // rest is as FetchCache says.
  absl::StatusOr<FetchedCache> FetchCache(const std::string& handle,
                                          const FetchOptions& options = {});
  // What FetchCache() would bring, without the tensors: for instance to make an arena of
  // FetchResultBytes().
  absl::StatusOr<v1::CacheInfo> DescribeCache(const std::string& handle,
                                              const FetchOptions& options = {});
  // Begins the lease of a held cache anew, of that length or the one in force, and returns it.
  absl::StatusOr<absl::Duration> RenewCache(const std::string& handle,
                                            std::optional<absl::Duration> lease = std::nullopt,
                                            const HeldCallOptions& options = {});
  absl::Status ReleaseCache(const std::string& handle, const HeldCallOptions& options = {});

 private:
  explicit Client(std::unique_ptr<internal::ReplicaSet> replicas, const ClientOptions& options);
  // Calls the replica that holds the cache: `options.replica`, the only one, or each in turn until
  // one knows it. A call has until `until`: those that follow have a part of the time.
  absl::Status CallHolder(
      const HeldCallOptions& options,
      absl::FunctionRef<absl::Status(internal::Replica&, absl::Time until)> call);

  std::unique_ptr<internal::ReplicaSet> replicas_;
  std::shared_ptr<internal::BytesPool> pool_;
};

}  // namespace structkv::client
