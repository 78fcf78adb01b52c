#include "service/server.h"

#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "grpc/grpc.h"
#include "grpcpp/create_channel_posix.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "grpcpp/server_posix.h"
#include "kernels/backend_registry.h"
#include "service/live.h"
#include "service/rpc/compression_service.h"
#include "service/rpc/connection_listener.h"
#include "service/rpc/held_caches_service.h"
#include "service/rpc/region_service.h"
#include "service/rpc/stream_set.h"
#include "service/server_limits.h"
#include "service/transport/cuda_ipc.h"
#include "service/transport/nccl/nccl_api.h"
#include "service/transport/shared_memory.h"
#include "service/unix_socket.h"

namespace structkv {
namespace {

constexpr char kServiceName[] = "structkv.v1.Compression";
// How long streams may take to notice a shutdown before gRPC cuts them off.
constexpr absl::Duration kShutdownLimit = absl::Seconds(1);
// Of what one peer may have: what breaks its connection, so that less is refused by the stream.
constexpr int64_t kFlood = 4;
// How soon a drain notices that nothing is held any more, or has its progress told.
constexpr absl::Duration kDrainLook = absl::Milliseconds(50);

// Often enough to be exact to about an eighth of the shortest limit.
absl::Duration TickFor(const rpc::StreamLimits& limits) {
  const absl::Duration shortest =
      std::min({limits.stall, limits.silence, limits.session, limits.shard_group});
  return std::clamp(shortest / 8, absl::Milliseconds(5), absl::Milliseconds(500));
}

// The options with what the sessions need of regions and of NCCL, where these are not null.
ServerOptions WithTransports(ServerOptions options,
                             const std::shared_ptr<transport::RegionRegistry>& registry,
                             const rpc::NcclHost* nccl, const Backend& backend) {
  if (nccl != nullptr) options.sessions.transports[transport::Kind::kNccl] = nccl->Offer();
  if (registry == nullptr) return options;
  const auto offer = [&](transport::Kind kind, auto grant) {
    options.sessions.transports[kind] =
        transport::Grant([registry, grant](const auto& request, const auto& sizes) {
          return grant(*registry, request, sizes);
        });
  };
  offer(transport::Kind::kSharedMemory, transport::GrantSharedMemory);
  if (backend.capabilities().device_memory) {
    offer(transport::Kind::kCudaIpc, transport::GrantCudaIpc);
  }
  options.regions.warn = [log = options.warnings](const std::string& text) {
    if (log != nullptr) log->Write("warning", {{"regions", text}});
  };
  return options;
}

std::shared_ptr<transport::RegionRegistry> MakeRegistry(const ServerOptions& options) {
  if (options.regions.socket.path.empty()) return nullptr;
  transport::RegionOptions regions = options.regions.regions;
  if (options.sessions.clock != nullptr) regions.clock = options.sessions.clock;
  return std::make_shared<transport::RegionRegistry>(regions);
}

std::unique_ptr<rpc::NcclHost> MakeNccl(const ServerOptions& options, const Backend& backend,
                                        std::shared_ptr<rpc::Identity> identity,
                                        rpc::PeerStreams peers) {
  if (options.nccl.library.empty()) return nullptr;
  auto host = std::make_unique<rpc::NcclHost>(options.nccl, options.streams.stall, backend,
                                              std::move(identity), std::move(peers));
  if (!host->status().ok() && options.warnings != nullptr) {
    const std::string text(host->status().message());
    options.warnings->Write("warning", {{"nccl", text}});
  }
  return host;
}

// "host:0" with the port that was chosen.
std::string BoundAddress(const std::string& address, int port) {
  if (rpc::IsUnixAddress(address)) return address;
  const size_t colon = address.rfind(':');
  return absl::StrCat(address.substr(0, colon), ":", port);
}

}  // namespace

class Server::Impl {
 public:
  Impl(ServerOptions options, ChosenBackend backend, std::shared_ptr<rpc::Identity> identity)
      : identity_(std::move(identity)),
        peers_(MaxStreamsPerPeer(options)),
        regions_(MakeRegistry(options)),
        nccl_(MakeNccl(options, *backend.backend, identity_, peers_)),
        options_(WithTransports(std::move(options), regions_, nccl_.get(), *backend.backend)),
        backend_reason_(std::move(backend.reason)),
        sessions_(options_.sessions, std::move(backend.backend)),
        limits_(options_.streams),
        streams_(TickFor(options_.streams), [this] { sessions_.held_caches().DropExpired(); }),
        service_(Shared()),
        held_caches_service_(Shared()),
        region_service_(regions_, &sessions_.backend(), identity_) {}

  ~Impl() { Shutdown(); }

  rpc::StreamShared Shared() {
    return {.limits = limits_,
            .sessions = &sessions_,
            .streams = &streams_,
            .peers = peers_,
            .identity = identity_.get(),
            .log = options_.log.get(),
            .observer = options_.observer,
            .trace_ratio = options_.trace_ratio,
            .region_socket = options_.regions.socket.path};
  }

  absl::Status Listen() {
    if (regions_ != nullptr) {
      absl::StatusOr<std::unique_ptr<rpc::RegionHost>> host =
          rpc::RegionHost::Start(options_.regions, regions_);
      if (!host.ok()) return host.status();
      region_host_ = *std::move(host);
    }
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    SetLimits(options_, &builder);
    std::shared_ptr<grpc::ServerCredentials> tls;
    if (options_.tls.enabled()) {
      auto made = rpc::MakeCredentials(options_.tls);
      if (!made.ok()) return made.status();
      tls = *std::move(made);
    }
    std::vector<int> ports(options_.listen.size(), 0);
    std::vector<rpc::ConnectionListener::Place> places;
    for (size_t i = 0; i < ports.size(); ++i) {
      if (options_.max_connections > 0 && !rpc::IsUnixAddress(options_.listen[i])) {
        auto acceptor = builder.experimental().AddExternalConnectionAcceptor(
            grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD,
            tls == nullptr ? grpc::InsecureServerCredentials() : tls);
        places.push_back({options_.listen[i], std::move(acceptor)});
        continue;
      }
      if (UnixSocketInUse(options_.listen[i])) {
        return absl::UnavailableError(
            absl::StrCat("cannot listen on ", options_.listen[i], ": another server does"));
      }
      const bool plain = tls == nullptr || rpc::IsUnixAddress(options_.listen[i]);
      builder.AddListeningPort(options_.listen[i], plain ? grpc::InsecureServerCredentials() : tls,
                               &ports[i]);
    }
    builder.RegisterService(&service_);
    builder.RegisterService(&held_caches_service_);
    builder.RegisterService(&region_service_);
    if (nccl_ != nullptr) builder.RegisterService(&nccl_->service());
    if (!places.empty()) {
      auto listener =
          rpc::ConnectionListener::Bind(std::move(places),
                                        {.connections = options_.max_connections,
                                         .streams = kFlood * MaxStreamsPerPeer(options_),
                                         .ack = options_.keepalive_timeout},
                                        options_.warnings);
      if (!listener.ok()) return listener.status();
      listener_ = *std::move(listener);
    }
    server_ = builder.BuildAndStart();
    size_t bound = 0;
    for (size_t i = 0; i < ports.size(); ++i) {
      if (options_.max_connections > 0 && !rpc::IsUnixAddress(options_.listen[i])) {
        ports[i] = listener_->ports()[bound++];
      }
      if (ports[i] > 0) continue;
      return absl::UnavailableError(absl::StrCat(
          "cannot listen on ", options_.listen[i],
          ": the address is taken, not of this machine, not permitted or not an address"));
    }
    if (server_ == nullptr) return absl::InternalError("gRPC did not start");
    for (size_t i = 0; i < ports.size(); ++i) {
      addresses_.push_back(BoundAddress(options_.listen[i], ports[i]));
      if (port_ == 0 && !rpc::IsUnixAddress(options_.listen[i])) port_ = ports[i];
    }
    if (listener_ != nullptr) listener_->Start();
    server_->GetHealthCheckService()->SetServingStatus(kServiceName, true);
    return absl::OkStatus();
  }

  absl::Status Reload(const ServerOptions& next) {
    if (absl::Status status = CheckOptions(next); !status.ok()) return status;
    absl::Status status =
        identity_->Reload(next.identity.certificate_names, next.identity.proxy_names);
    if (!status.ok()) return status;
    sessions_.SetLimits(session::LimitsOf(next.sessions));
    rpc::StreamLimits limits = next.streams;
    limits.max_message_bytes = options_.streams.max_message_bytes;
    limits_.Set(limits);
    return absl::OkStatus();
  }

  absl::Duration DrainLeft() const {
    return std::max(absl::ZeroDuration(), absl::Nanoseconds(drain_end_ - rpc::SteadyNanos()));
  }

  std::optional<DrainProgress> Progress() const {
    if (drain_end_ == 0) return std::nullopt;
    return DrainProgress{.streams = streams_.size(),
                         .prompts = sessions_.active_sessions(),
                         .nccl_pairs = nccl_ == nullptr ? 0 : nccl_->stats().pairs,
                         .held_caches = sessions_.held_caches().count(),
                         .left = DrainLeft()};
  }

  bool Drain(absl::Duration limit, const std::function<void(const DrainProgress&)>& tell) {
    drain_end_ = rpc::SteadyNanos() + absl::ToInt64Nanoseconds(std::min(limit, absl::Hours(10000)));
    server_->GetHealthCheckService()->SetServingStatus(false);
    sessions_.StartDraining();
    bool attaching = nccl_ != nullptr;
    int64_t tell_at = 0;
    bool idle = false;
    bool held = false;
    while (true) {
      if (const int64_t now = rpc::SteadyNanos(); tell && now >= tell_at) {
        tell(*Progress());
        tell_at = now + absl::ToInt64Nanoseconds(absl::Seconds(1));
      }
      // In this order: a prompt's cache is held before its stream is over.
      idle = streams_.size() == 0;
      held = sessions_.held_caches().count() > 0;
      // Whoever comes for a cache may have a GPU attached for it.
      if (attaching && !held) {
        attaching = false;
        nccl_->StopAttaching(absl::UnavailableError("the server is draining"));
      }
      if (!sessions_.backend().Health().ok()) return false;
      if ((idle && !held) || DrainLeft() == absl::ZeroDuration()) break;
      const absl::Duration wait = std::min(kDrainLook, DrainLeft());
      if (idle) {
        absl::SleepFor(wait);
      } else {
        streams_.WaitUntilEmpty(wait);
      }
    }
    if (idle && nccl_ != nullptr) nccl_->WaitUntilSettled(absl::Now() + DrainLeft());
    Shutdown();
    return idle;
  }

  void FailAll(const absl::Status& status, absl::Duration limit) {
    server_->GetHealthCheckService()->SetServingStatus(false);
    sessions_.StartDraining();
    if (nccl_ != nullptr) nccl_->EndAll(status);
    streams_.EndAll(status);
    streams_.WaitUntilEmpty(limit);
  }

  void Shutdown() {
    {
      absl::MutexLock lock(&mutex_);
      if (shut_down_ || server_ == nullptr) return;
      shut_down_ = true;
    }
    sessions_.StartDraining();
    if (listener_ != nullptr) listener_->Stop();
    const absl::Status why = absl::UnavailableError("the server is shutting down");
    if (nccl_ != nullptr) nccl_->EndAll(why);
    streams_.EndAll(why);
    server_->Shutdown(absl::ToChronoTime(absl::Now() + kShutdownLimit));
    streams_.WaitUntilEmpty(absl::InfiniteDuration());
    server_->Wait();
    // Its threads tell sessions how transfers end, also those that have ended.
    if (nccl_ != nullptr) nccl_->Stop();
  }

  const std::shared_ptr<rpc::Identity> identity_;
  const rpc::PeerStreams peers_;
  const std::shared_ptr<transport::RegionRegistry> regions_;  // null: none
  const std::unique_ptr<rpc::NcclHost> nccl_;                 // null: none; outlives sessions_
  const ServerOptions options_;
  const std::string backend_reason_;
  session::SessionManager sessions_;
  Live<rpc::StreamLimits> limits_;
  rpc::StreamSet streams_;
  rpc::CompressionService service_;
  rpc::HeldCachesService held_caches_service_;
  rpc::RegionService region_service_;
  std::unique_ptr<rpc::RegionHost> region_host_;
  std::unique_ptr<rpc::ConnectionListener> listener_;  // null: gRPC listens itself
  std::unique_ptr<grpc::Server> server_;
  std::vector<std::string> addresses_;
  int port_ = 0;
  absl::Mutex mutex_;
  bool shut_down_ ABSL_GUARDED_BY(mutex_) = false;
  std::atomic<int64_t> drain_end_{0};  // of SteadyNanos(); 0: it does not drain
};

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Server::~Server() = default;

namespace {

absl::StatusOr<std::shared_ptr<session::PivotProfile>> OpenPivotProfile(
    const ServerOptions& options) {
  absl::StatusOr<std::shared_ptr<session::PivotProfile>> profile = session::PivotProfile::Open(
      {.file = options.pivot_profile, .warn = [log = options.warnings](const std::string& text) {
         if (log != nullptr) log->Write("warning", {{"pivot_profile", text}});
       }});
  if (profile.ok()) return profile;
  return absl::Status(profile.status().code(),
                      absl::StrCat("pivot-profile: ", profile.status().message()));
}

// That of ChooseBackend, in the words of the options.
absl::Status BackendError(const ServerOptions& options, const absl::Status& status) {
  std::string text = absl::StrCat("backend ", options.backend, ": ", status.message());
  if (status.code() == absl::StatusCode::kResourceExhausted) {
    absl::StrAppend(&text, " (device-memory, of which nccl-memory is a part)");
  }
  return absl::Status(status.code(), text);
}

}  // namespace

BackendOptions BackendOptionsOf(const ServerOptions& options) {
  BackendOptions backend = {.device_memory_bytes = options.device_memory_bytes};
  if (!options.nccl.library.empty() && nccl::Api::Load(options.nccl.library).ok()) {
    backend.reserve_bytes = options.nccl.memory_bytes;
  }
  backend.warn = [log = options.warnings](const std::string& text) {
    if (log != nullptr) log->Write("warning", {{"backend", text}});
  };
  return backend;
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(ServerOptions options) {
  absl::StatusOr<ChosenBackend> backend = ChooseBackend(options.backend, BackendOptionsOf(options));
  if (!backend.ok()) return BackendError(options, backend.status());
  return Start(std::move(options), *std::move(backend));
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(ServerOptions options,
                                                      std::unique_ptr<Backend> backend) {
  return Start(std::move(options), ChosenBackend{std::move(backend), "given"});
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(ServerOptions options,
                                                      ChosenBackend backend) {
  // Once more than it is given back. With its last object gRPC shuts down, and waits for a thread
  // of its own that may poll for ten more seconds; every other use of gRPC waits meanwhile.
  grpc_init();
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  if (options.sessions.pivot_profile == nullptr) {
    absl::StatusOr<std::shared_ptr<session::PivotProfile>> profile = OpenPivotProfile(options);
    if (!profile.ok()) return profile.status();
    options.sessions.pivot_profile = *std::move(profile);
  }
  options.identity.warn = [log = options.warnings](const std::string& text) {
    if (log != nullptr) log->Write("warning", {{"identity", text}});
  };
  auto identity = rpc::Identity::Open(options.identity);
  if (!identity.ok()) return identity.status();
  auto impl = std::make_unique<Impl>(std::move(options), std::move(backend), *std::move(identity));
  if (absl::Status status = impl->Listen(); !status.ok()) return status;
  return std::unique_ptr<Server>(new Server(std::move(impl)));
}

const ServerOptions& Server::options() const { return impl_->options_; }
const std::vector<std::string>& Server::addresses() const { return impl_->addresses_; }
int Server::port() const { return impl_->port_; }
session::SessionManager& Server::sessions() { return impl_->sessions_; }
const session::SessionManager& Server::sessions() const { return impl_->sessions_; }
absl::Status Server::nccl_status() const {
  return impl_->nccl_ == nullptr ? absl::OkStatus() : impl_->nccl_->status();
}
const transport::RegionRegistry* Server::regions() const { return impl_->regions_.get(); }
const std::string& Server::backend_reason() const { return impl_->backend_reason_; }
int64_t Server::active_streams() const { return impl_->streams_.size(); }
std::vector<rpc::PromptReport> Server::Report() const { return impl_->streams_.Report(); }
nccl::HubStats Server::nccl_stats() const {
  return impl_->nccl_ == nullptr ? nccl::HubStats{} : impl_->nccl_->stats();
}

absl::StatusOr<std::shared_ptr<grpc::Channel>> Server::PrivateChannel(
    const grpc::ChannelArguments& arguments) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) != 0) {
    return absl::ErrnoToStatus(errno, "socketpair");
  }
  grpc::AddInsecureChannelFromFd(impl_->server_.get(), ends[0]);
  return grpc::CreateCustomInsecureChannelFromFd("structkv", ends[1], arguments);
}

absl::Status Server::Reload(const ServerOptions& next) { return impl_->Reload(next); }
int64_t Server::connections() const {
  return impl_->listener_ == nullptr ? 0 : impl_->listener_->connections();
}
int64_t Server::connections_refused() const {
  return impl_->listener_ == nullptr ? 0 : impl_->listener_->refused();
}
int64_t Server::connections_broken() const {
  return impl_->listener_ == nullptr ? 0 : impl_->listener_->broken();
}
rpc::RefusedStreams Server::streams_refused() const { return impl_->peers_.refused(); }
rpc::RefusedCalls Server::calls_refused() const { return impl_->identity_->refused(); }
bool Server::Drain(absl::Duration limit, const std::function<void(const DrainProgress&)>& tell) {
  return impl_->Drain(limit, tell);
}
std::optional<DrainProgress> Server::drain_progress() const { return impl_->Progress(); }
void Server::FailAll(const absl::Status& status, absl::Duration limit) {
  impl_->FailAll(status, limit);
}
void Server::Shutdown() { impl_->Shutdown(); }

}  // namespace structkv
