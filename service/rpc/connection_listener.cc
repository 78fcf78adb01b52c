#include "service/rpc/connection_listener.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <set>
#include <thread>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "service/rpc/open_streams.h"
#include "service/rpc/stream_set.h"
#include "service/rpc/warn_limit.h"
#include "structkv/v1/address.h"

namespace structkv::rpc {
namespace {

constexpr int kBacklog = 1024;
// How often gRPC is asked for its streams: seldom enough that it takes a twentieth of a core at
// most.
constexpr int64_t kLookNanos = 100'000'000;
constexpr int64_t kLookShare = 20;
// How long to wait where the system has no descriptor left.
constexpr int kPauseMillis = 100;

class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

// What tells a socket from a later one with the same descriptor; 0 where it is none.
uint64_t SocketNumber(int fd) {
  struct stat file = {};
  return fstat(fd, &file) == 0 && S_ISSOCK(file.st_mode) ? file.st_ino : 0;
}

// A connection that gRPC was given.
struct Connection {
  uint64_t socket = 0;
  std::string peer;
};

bool IsThere(int fd, const Connection& connection) { return SocketNumber(fd) == connection.socket; }

void SetOption(int fd, int level, int name, int value) {
  setsockopt(fd, level, name, &value, sizeof(value));  // the connection works without
}

struct HostPort {
  std::string host;
  std::string port;
};

absl::StatusOr<HostPort> Split(const std::string& address) {
  absl::string_view rest = address;
  for (absl::string_view scheme : {"ipv4:", "ipv6:", "dns:///", "dns:"}) {
    if (absl::ConsumePrefix(&rest, scheme)) break;
  }
  const auto bad = [&address](absl::string_view why) {
    return absl::InvalidArgumentError(
        absl::StrCat("listen is ", address, ": ", why,
                     "; write host:port (127.0.0.1:7411, [::]:7411) or unix:/path"));
  };
  const size_t colon = rest.rfind(':');
  if (colon == absl::string_view::npos) return bad("there is no port");
  absl::string_view host = rest.substr(0, colon);
  const absl::string_view port = rest.substr(colon + 1);
  int number = -1;
  if (!absl::SimpleAtoi(port, &number) || number < 0 || number > 65535) {
    return bad(absl::StrCat("'", port, "' is no port from 0 to 65535"));
  }
  if (absl::ConsumePrefix(&host, "[")) {
    if (!absl::ConsumeSuffix(&host, "]")) return bad("a bracket is not closed");
  } else if (host.find(':') != absl::string_view::npos) {
    return bad("an IPv6 address stands in brackets");
  }
  if (host.empty()) return bad("there is no host");
  if (host.find_first_of(" /[]") != absl::string_view::npos) return bad("that is no host");
  return HostPort{std::string(host), std::to_string(number)};
}

int PortOf(int fd) {
  sockaddr_storage address = {};
  socklen_t size = sizeof(address);
  if (getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) return 0;
  if (address.ss_family == AF_INET6) {
    return ntohs(reinterpret_cast<const sockaddr_in6*>(&address)->sin6_port);
  }
  return ntohs(reinterpret_cast<const sockaddr_in*>(&address)->sin_port);
}

absl::StatusOr<Descriptor> ListenOn(const addrinfo& at, bool both_families, int* error) {
  const auto failed = [error](const char* what) {
    *error = errno;
    return absl::ErrnoToStatus(*error, what);
  };
  Descriptor fd(socket(at.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (fd.get() < 0) return failed("socket");
  SetOption(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1);
  if (at.ai_family == AF_INET6) {
    SetOption(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, both_families ? 0 : 1);
  }
  if (bind(fd.get(), at.ai_addr, at.ai_addrlen) != 0) return failed("bind");
  if (listen(fd.get(), kBacklog) != 0) return failed("listen");
  return fd;
}

// All addresses that the host of this process has of a host; of a wildcard, that of both families
// where there are both. One that cannot be had is an error, except where port 0 is asked for and
// the port that the first one got is taken at another.
absl::StatusOr<std::vector<Descriptor>> Listen(const HostPort& where) {
  const bool any = where.host == "0.0.0.0" || where.host == "::";
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  std::vector<std::string> hosts = {where.host};
  if (any) hosts = {"::", "0.0.0.0"};
  absl::Status last = absl::OkStatus();
  std::vector<Descriptor> sockets;
  std::set<std::string> seen;  // hosts files may name an address twice
  std::string port = where.port;
  for (const std::string& host : hosts) {
    addrinfo* found = nullptr;
    if (const int error = getaddrinfo(host.c_str(), port.c_str(), &hints, &found); error != 0) {
      last = absl::NotFoundError(gai_strerror(error));
      continue;
    }
    const std::unique_ptr<addrinfo, void (*)(addrinfo*)> all(found, freeaddrinfo);
    for (addrinfo* at = found; at != nullptr; at = at->ai_next) {
      if (port != where.port) {  // the same port at every address
        auto* const v4 = reinterpret_cast<sockaddr_in*>(at->ai_addr);
        v4->sin_port = htons(static_cast<uint16_t>(std::stoi(port)));  // where IPv6 has it too
      }
      const auto* const bytes = reinterpret_cast<const char*>(at->ai_addr);
      if (!seen.emplace(bytes, at->ai_addrlen).second) continue;
      int error = 0;
      absl::StatusOr<Descriptor> socket = ListenOn(*at, any, &error);
      if (!socket.ok()) {
        const bool not_here = error == EAFNOSUPPORT || error == EADDRNOTAVAIL;
        if (!not_here && port == where.port) return socket.status();
        last = socket.status();
        continue;
      }
      port = std::to_string(PortOf(socket->get()));
      sockets.push_back(*std::move(socket));
    }
    if (any && !sockets.empty()) break;
  }
  if (sockets.empty()) return last;
  return sockets;
}

}  // namespace

absl::Status CheckListenAddress(const std::string& address) {
  if (!wire::IsUnixAddress(address)) return Split(address).status();
  absl::string_view path = address;
  if (!absl::ConsumePrefix(&path, "unix-abstract:")) {
    absl::ConsumePrefix(&path, "unix:");
    absl::ConsumePrefix(&path, "//");
  }
  constexpr size_t kMost = sizeof(sockaddr_un::sun_path) - 1;
  if (!path.empty() && path.size() <= kMost) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("listen is ", address, ": the path has ",
                                                 path.size(), " bytes; 1 to ", kMost,
                                                 " are allowed"));
}

class ConnectionListener::Impl {
 public:
  struct Socket {
    Descriptor fd;
    size_t place;
  };

  Impl(const Limits& limits, std::shared_ptr<Log> warnings)
      : max_(limits.connections),
        max_streams_(limits.streams),
        ack_millis_(static_cast<int>(absl::ToInt64Milliseconds(limits.ack))),
        warnings_(std::move(warnings)),
        wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
  ~Impl() { Stop(); }

  absl::Status Bind(std::vector<Place> places) {
    places_ = std::move(places);
    for (size_t i = 0; i < places_.size(); ++i) {
      const absl::StatusOr<HostPort> where = Split(places_[i].address);
      if (!where.ok()) return where.status();
      absl::StatusOr<std::vector<Descriptor>> sockets = Listen(*where);
      if (!sockets.ok()) {
        return absl::UnavailableError(absl::StrCat("cannot listen on ", places_[i].address, ": ",
                                                   sockets.status().message()));
      }
      ports_.push_back(PortOf(sockets->front().get()));
      for (Descriptor& one : *sockets) sockets_.push_back({std::move(one), i});
    }
    return absl::OkStatus();
  }

  void Start() {
    thread_ = std::thread([this] { Run(); });
    if (max_streams_ > 0) watch_ = std::thread([this] { Watch(); });
  }

  void Stop() {
    if (!thread_.joinable()) return;
    const uint64_t one = 1;
    // It cannot be full.
    [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof(one));
    thread_.join();
    if (watch_.joinable()) watch_.join();
    sockets_.clear();
  }

  int64_t connections() const {
    absl::MutexLock lock(&mutex_);
    DropClosed();
    return static_cast<int64_t>(open_.size());
  }
  int64_t refused() const { return refused_; }
  int64_t broken() const { return broken_; }
  const std::vector<int>& ports() const { return ports_; }

 private:
  void Run() {
    std::vector<pollfd> waits;
    for (const Socket& socket : sockets_) waits.push_back({socket.fd.get(), POLLIN, 0});
    waits.push_back({wake_.get(), POLLIN, 0});
    while (true) {
      if (poll(waits.data(), waits.size(), -1) < 0) continue;  // a signal
      if (waits.back().revents != 0) return;
      for (size_t i = 0; i < sockets_.size(); ++i) {
        if (waits[i].revents != 0) Accept(sockets_[i]);
      }
    }
  }

  // On a thread of its own: gRPC may read of a new connection on the one that brings it, for as
  // long as its peer sends without a pause.
  void Watch() {
    int64_t wait = kLookNanos;
    pollfd wake = {wake_.get(), POLLIN, 0};
    while (poll(&wake, 1, static_cast<int>(wait / 1'000'000)) <= 0) {
      const int64_t begin = SteadyNanos();
      BreakFloods();
      wait = std::max(kLookNanos, (SteadyNanos() - begin) * kLookShare);
    }
  }

  // What waits at one socket, but not for ever: others have their turn.
  void Accept(const Socket& socket) {
    for (int i = 0; i < kBacklog; ++i) {
      sockaddr_storage peer = {};
      socklen_t size = sizeof(peer);
      Descriptor fd(accept4(socket.fd.get(), reinterpret_cast<sockaddr*>(&peer), &size,
                            SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (fd.get() < 0) {
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
          Warn(absl::StrCat("no connection can be taken: ", std::strerror(errno)));
          poll(nullptr, 0, kPauseMillis);
        }
        if (errno == EINTR || errno == ECONNABORTED) continue;
        return;
      }
      if (!Admit(fd.get(), peer)) continue;
      SetOption(fd.get(), IPPROTO_TCP, TCP_NODELAY, 1);
      SetOption(fd.get(), IPPROTO_TCP, TCP_USER_TIMEOUT, ack_millis_);
      grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters connection;
      connection.fd = fd.release();
      places_[socket.place].acceptor->HandleNewConnection(&connection);
    }
  }

  // Counts the connection, where there is room for it.
  bool Admit(int fd, const sockaddr_storage& peer) {
    bool full = false;
    {
      absl::MutexLock lock(&mutex_);
      if (static_cast<int64_t>(open_.size()) >= max_) DropClosed();
      full = static_cast<int64_t>(open_.size()) >= max_;
      if (!full) open_[fd] = {SocketNumber(fd), PeerName(peer)};
    }
    if (!full) return true;
    ++refused_;
    Warn(absl::StrCat("max-connections is ", max_, ", and as many are there; ", refused_.load(),
                      " were refused since the start"));
    return false;
  }

  // gRPC closes connections as it likes: those whose descriptors are others' by now are gone.
  void DropClosed() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    absl::erase_if(open_, [](const auto& one) { return !IsThere(one.first, one.second); });
  }

  // gRPC notices that the connection is gone, and ends its streams.
  void BreakFloods() {
    for (const OpenStreams& streams : ReadOpenStreams()) {
      if (streams.count <= max_streams_) continue;
      absl::MutexLock lock(&mutex_);
      for (const auto& [fd, connection] : open_) {
        if (connection.peer != streams.peer || !IsThere(fd, connection)) continue;
        ++broken_;  // its peer may look as soon as it is broken
        // The descriptor may be another's between the look and this; that one then connects anew.
        shutdown(fd, SHUT_RDWR);
        Warn(absl::StrCat(streams.peer, " had ", streams.count, " streams on one connection; ",
                          max_streams_,
                          " are allowed (four times max-streams-per-peer): it is broken, as ",
                          broken_.load(), " were since the start"));
      }
    }
  }

  void Warn(const std::string& text) {
    if (warnings_ == nullptr || !warn_limit_.IsDue()) return;
    warnings_->Write("warning", {{"connections", text}});
  }

  const int64_t max_;
  const int64_t max_streams_;
  const int ack_millis_;
  const std::shared_ptr<Log> warnings_;
  const Descriptor wake_;
  std::vector<Place> places_;
  std::vector<Socket> sockets_;
  std::vector<int> ports_;
  std::thread thread_;
  std::thread watch_;
  WarnLimit warn_limit_;
  std::atomic<int64_t> refused_{0};
  std::atomic<int64_t> broken_{0};
  mutable absl::Mutex mutex_;
  mutable absl::flat_hash_map<int, Connection> open_ ABSL_GUARDED_BY(mutex_);  // by descriptor
};

ConnectionListener::ConnectionListener(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ConnectionListener::~ConnectionListener() = default;

absl::StatusOr<std::unique_ptr<ConnectionListener>> ConnectionListener::Bind(
    std::vector<Place> places, const Limits& limits, std::shared_ptr<Log> warnings) {
  auto impl = std::make_unique<Impl>(limits, std::move(warnings));
  if (absl::Status status = impl->Bind(std::move(places)); !status.ok()) return status;
  return std::unique_ptr<ConnectionListener>(new ConnectionListener(std::move(impl)));
}

const std::vector<int>& ConnectionListener::ports() const { return impl_->ports(); }
void ConnectionListener::Start() { impl_->Start(); }
void ConnectionListener::Stop() { impl_->Stop(); }
int64_t ConnectionListener::connections() const { return impl_->connections(); }
int64_t ConnectionListener::refused() const { return impl_->refused(); }
int64_t ConnectionListener::broken() const { return impl_->broken(); }

}  // namespace structkv::rpc
