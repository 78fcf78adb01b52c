// A StructKV server: sessions behind gRPC, with the standard health and reflection services.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/channel.h"
#include "grpcpp/support/channel_arguments.h"
#include "kernels/backend.h"
#include "kernels/backend_registry.h"
#include "service/rpc/compress_reactor.h"
#include "service/rpc/identity.h"
#include "service/rpc/log.h"
#include "service/rpc/nccl_host.h"
#include "service/rpc/peer_streams.h"
#include "service/rpc/region_host.h"
#include "service/rpc/tls.h"
#include "service/session/session.h"

namespace structkv {

struct ServerOptions {
  // Addresses to listen on: "host:port" (port 0: any free one), "unix:/path". None:
  // PrivateChannel() alone reaches the server.
  std::vector<std::string> listen = {"127.0.0.1:7411"};
  // Of the addresses that are not unix sockets.
  rpc::TlsOptions tls;
  // Allows addresses that other hosts reach without TLS.
  bool insecure = false;
  // `warn` is the server's own.
  rpc::IdentityOptions identity;
  // As in the backend registry; "auto": the best of this machine.
  std::string backend = "auto";
  // Memory taken of each GPU at the start, where the backend is CUDA's; 0: half of what is free.
  int64_t device_memory_bytes = 0;
  session::SessionManagerOptions sessions;
  rpc::StreamLimits streams;
  // Shared memory, and CUDA IPC where the backend has it; none where the socket's path is empty.
  rpc::RegionHostOptions regions;
  // NCCL, where the backend has GPUs; none where the library's name is empty. Where it cannot be
  // had the server starts without it, and says why.
  rpc::NcclOptions nccl;
  // Streams at once on one connection; more wait at the client.
  int max_streams_per_connection = 256;
  // Streams at once on one connection whose peer does not heed that, and so many times
  // kUnixConnections of all connections to unix sockets together; one more is RESOURCE_EXHAUSTED.
  // 0: twice max_streams_per_connection, since streams that end are counted for a moment longer
  // than their peer takes them to last.
  int64_t max_streams_per_peer = 0;
  // Connections at once to all TCP addresses; one more is closed unread. 0: no limit of its own.
  int64_t max_connections = 4096;
  // A connection is told to end after about this, and its streams have `streams.session` left; 0:
  // never.
  absl::Duration connection_age;
  // A connection without streams is closed after this; 0: never.
  absl::Duration connection_idle;
  // A connection that has not finished its handshake by then is closed.
  absl::Duration handshake_limit = absl::Seconds(10);
  // A silent connection is asked whether it lives this often, and closed without an answer in time:
  // how a client whose network went away is noticed.
  absl::Duration keepalive_interval = absl::Seconds(20);
  absl::Duration keepalive_timeout = absl::Seconds(10);
  // File that the pivots of each model are kept in; see session::PivotProfileOptions. Empty: memory
  // alone.
  std::string pivot_profile;
  // One line a session; null: no log.
  std::shared_ptr<rpc::Log> log;
  // What an operator should know; null: no log.
  std::shared_ptr<rpc::Log> warnings;
  // Share of the calls without a valid traceparent that the observer is to record as spans, of the
  // others those that are sampled; none: no call (rpc/call_labels.h).
  std::optional<double> trace_ratio;
  // Is told of prompts and fetches; may be null, and outlives the server.
  rpc::StreamObserver* observer = nullptr;
};

// ServerOptions::max_streams_per_peer, or what stands for 0.
int64_t MaxStreamsPerPeer(const ServerOptions& options);

// INVALID_ARGUMENT for options out of range, which Server::Start() returns as well.
absl::Status CheckOptions(const ServerOptions& options);

// What is left of a server that drains.
struct DrainProgress {
  int64_t streams = 0;
  int64_t prompts = 0;
  int64_t nccl_pairs = 0;
  int64_t held_caches = 0;
  absl::Duration left;  // until the drain limit
};

// What the backend registry is asked for. Of a GPU's memory a part is set apart for transfers where
// NCCL can be loaded.
BackendOptions BackendOptionsOf(const ServerOptions& options);

// Thread-safe.
class Server {
 public:
  // Starts to serve. INVALID_ARGUMENT for options out of range, UNAVAILABLE where an address cannot
  // be listened on. Also what ChooseBackend, PivotProfile::Open, Identity::Open and MakeCredentials
  // return.
  static absl::StatusOr<std::unique_ptr<Server>> Start(ServerOptions options);
  // The same with a given backend, whatever `options.backend` says.
  static absl::StatusOr<std::unique_ptr<Server>> Start(ServerOptions options,
                                                       std::unique_ptr<Backend> backend);

  // Shuts down at once, if nobody did.
  ~Server();

  const ServerOptions& options() const;
  // The addresses, with the port that was chosen.
  const std::vector<std::string>& addresses() const;
  // The port of the first TCP address; 0 where there is none.
  int port() const;
  session::SessionManager& sessions();
  const session::SessionManager& sessions() const;
  // Why the NCCL transport that was asked for is not there; OK where it is, or nobody asked.
  absl::Status nccl_status() const;
  // Of all GPUs together.
  nccl::HubStats nccl_stats() const;
  // Null where there are no regions.
  const transport::RegionRegistry* regions() const;
  // Why it has the backend that it has, for people.
  const std::string& backend_reason() const;
  // Streams that are not over.
  int64_t active_streams() const;
  // The prompts that run now, in no order.
  std::vector<rpc::PromptReport> Report() const;
  // A channel to this server over a pair of sockets that nobody else can reach, for a client in the
  // same process. (gRPC 1.51's own channel within a process loses a stream's last message now and
  // then, and crashes once the server is shut down.) What socketpair() fails with.
  absl::StatusOr<std::shared_ptr<grpc::Channel>> PrivateChannel(
      const grpc::ChannelArguments& arguments);

  // Takes from `next` what may change while it runs: the limits of prompts and tenants, those of
  // time of streams, leases of held caches, patterns of certificates' names. Reads the token file.
  // As CheckOptions and Identity::Reload; then nothing has changed.
  absl::Status Reload(const ServerOptions& next);

  // Connections to TCP addresses, and those that were refused for max_connections; 0 where there is
  // no limit.
  int64_t connections() const;
  int64_t connections_refused() const;
  // Connections to TCP addresses that were broken for more than four times max_streams_per_peer,
  // those counted that no service was told of; 0 where there is no limit of connections.
  int64_t connections_broken() const;
  rpc::RefusedStreams streams_refused() const;
  rpc::RefusedCalls calls_refused() const;

  // Health says NOT_SERVING first and new prompts are UNAVAILABLE. Within `limit` streams that run
  // may finish, and held caches are fetched, renewed and released as before, until their leases
  // end; what runs then fails as UNAVAILABLE, and caches that are still held are lost. Ends with a
  // shutdown. True where no stream was left. `tell`, where it is set, is called at once and every
  // second. Once. False at once, and without a shutdown, where the backend is lost: then FailAll().
  bool Drain(absl::Duration limit, const std::function<void(const DrainProgress&)>& tell = nullptr);
  // None while it does not drain.
  std::optional<DrainProgress> drain_progress() const;

  // For a server whose backend is lost: health says NOT_SERVING, and every stream, running or new,
  // fails with `status`. Waits until the running ones are over, at most `limit`: a thread may be
  // stuck in the backend. The same holds for the destructor, which has no limit.
  void FailAll(const absl::Status& status, absl::Duration limit);

  // Fails what runs as UNAVAILABLE and stops serving. Once; later calls do nothing.
  void Shutdown();

 private:
  class Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  static absl::StatusOr<std::unique_ptr<Server>> Start(ServerOptions options,
                                                       ChosenBackend backend);
  std::unique_ptr<Impl> impl_;
};

}  // namespace structkv
