#include "service/rpc/region_socket.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <unordered_map>
#include <utility>  // before Asio: its 1.74 needs it
#include <vector>

#include "absl/strings/str_cat.h"
#include "boost/asio/io_context.hpp"
#include "boost/asio/posix/stream_descriptor.hpp"
#include "boost/asio/steady_timer.hpp"
#include "service/rpc/identity.h"
#include "service/rpc/status_mapping.h"
#include "service/transport/file_descriptor.h"
#include "service/unix_socket.h"
#include "structkv/v1/region.pb.h"

namespace structkv::rpc {
namespace {

using Error = boost::system::error_code;
using Descriptor = boost::asio::posix::stream_descriptor;
using transport::FileDescriptor;

constexpr size_t kMaxPacketBytes = 4096;
// Descriptors that a packet may bring before it is looked at; more are closed by the kernel.
constexpr size_t kMaxDescriptors = 4;
// After a failure to accept that passes by itself (no descriptors left).
constexpr std::chrono::milliseconds kAcceptPause(100);

absl::Status Unavailable(const std::string& path, absl::string_view why) {
  return absl::UnavailableError(absl::StrCat("cannot listen on region-socket ", path, ": ", why));
}

std::string ErrorText() { return std::generic_category().message(errno); }

absl::StatusOr<FileDescriptor> Bind(const std::string& path) {
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(name.sun_path)) {
    return Unavailable(path, absl::StrCat("the path has ", path.size(), " bytes; 1 to ",
                                          sizeof(name.sun_path) - 1, " are allowed"));
  }
  std::memcpy(name.sun_path, path.data(), path.size());
  if (UnixSocketInUse("unix:" + path, SOCK_SEQPACKET)) {
    return Unavailable(path, "another server does");
  }
  struct stat status = {};
  if (lstat(path.c_str(), &status) == 0) {  // of a server that is gone
    if (!S_ISSOCK(status.st_mode)) return Unavailable(path, "there is a file that is no socket");
    unlink(path.c_str());
  }
  FileDescriptor listening(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listening.valid() ||
      bind(listening.get(), reinterpret_cast<const sockaddr*>(&name), sizeof(name)) != 0 ||
      listen(listening.get(), SOMAXCONN) != 0) {
    return Unavailable(path, ErrorText());
  }
  return listening;
}

// One packet with its descriptors.
struct Packet {
  enum class Kind : uint8_t { kNone, kPacket, kEnd };
  Kind kind = Kind::kNone;
  std::string bytes;
  std::vector<FileDescriptor> files;
};

Packet Receive(int fd) {
  std::array<char, kMaxPacketBytes + 1> bytes;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kMaxDescriptors * sizeof(int))> control;
  iovec data = {bytes.data(), bytes.size()};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t size = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  Packet packet;
  if (size < 0) {
    const bool again = errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
    packet.kind = again ? Packet::Kind::kNone : Packet::Kind::kEnd;
    return packet;
  }
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int file = -1;
      std::memcpy(&file, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
      // Closing a socket that lingers would wait for its peer. Of another file this is an error.
      const linger at_once = {.l_onoff = 1, .l_linger = 0};
      (void)setsockopt(file, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
      packet.files.emplace_back(file);
    }
  }
  const bool too_long = static_cast<size_t>(size) > kMaxPacketBytes;
  packet.kind = size == 0 || too_long ? Packet::Kind::kEnd : Packet::Kind::kPacket;
  packet.bytes.assign(bytes.data(), static_cast<size_t>(size));
  return packet;
}

}  // namespace

class RegionSocket::Impl {
 public:
  Impl(const RegionSocketOptions& options, FileDescriptor listening,
       transport::RegionRegistry* registry, boost::asio::io_context* io)
      : options_(options),
        registry_(*registry),
        io_(*io),
        listening_(*io, listening.Release()),
        accept_pause_(*io) {
    AwaitConnection();
  }

  ~Impl() {
    for (const auto& [id, connection] : connections_) registry_.EndConnection(id);
    unlink(options_.path.c_str());
  }

 private:
  struct Connection {
    explicit Connection(boost::asio::io_context& io) : socket(io), idle(io) {}
    Descriptor socket;
    boost::asio::steady_timer idle;
    std::string owner;
  };

  void AwaitConnection() {
    listening_.async_wait(Descriptor::wait_read, [this](const Error& error) {
      if (!error) Accept();
    });
  }

  void Accept() {
    FileDescriptor file(
        accept4(listening_.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!file.valid() && errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
      accept_pause_.expires_after(kAcceptPause);
      accept_pause_.async_wait([this](const Error& error) {
        if (!error) AwaitConnection();
      });
      return;
    }
    AwaitConnection();
    if (!file.valid() || connections_.size() >= static_cast<size_t>(options_.max_connections)) {
      return;
    }
    ucred peer = {};
    socklen_t size = sizeof(peer);
    if (getsockopt(file.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return;
    auto connection = std::make_unique<Connection>(io_);
    Error error;
    connection->socket.assign(file.get(), error);
    if (error) return;
    (void)file.Release();
    connection->owner = absl::StrCat("pid ", peer.pid, ", uid ", peer.uid);
    const int64_t id = ++last_id_;
    connections_[id] = std::move(connection);
    AwaitPacket(id);
    AwaitIdle(id);
  }

  void AwaitPacket(int64_t id) {
    connections_.at(id)->socket.async_wait(Descriptor::wait_read, [this, id](const Error& error) {
      if (!error) Read(id);
    });
  }

  // Looks again and again whether the connection holds anything.
  void AwaitIdle(int64_t id) {
    boost::asio::steady_timer& timer = connections_.at(id)->idle;
    timer.expires_after(absl::ToChronoNanoseconds(options_.idle_limit));
    timer.async_wait([this, id](const Error& error) {
      if (error) return;
      if (registry_.RegionsOf(id) == 0) {
        Close(id);
      } else {
        AwaitIdle(id);
      }
    });
  }

  void Read(int64_t id) {
    Connection& connection = *connections_.at(id);
    Packet packet = Receive(connection.socket.native_handle());
    if (packet.kind == Packet::Kind::kPacket) {
      v1::RegisterDescriptorRequest request;
      if (!request.ParseFromString(packet.bytes) ||
          !Answer(connection, Register(id, request, std::move(packet.files)))) {
        packet.kind = Packet::Kind::kEnd;
      }
    }
    if (packet.kind == Packet::Kind::kEnd) {
      Close(id);
    } else {
      AwaitPacket(id);
    }
  }

  absl::StatusOr<transport::RegisteredRegion> Register(int64_t id,
                                                       const v1::RegisterDescriptorRequest& request,
                                                       std::vector<FileDescriptor> files) {
    if (files.size() != 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("the packet has ", files.size(), " descriptors; 1 is allowed"));
    }
    if (request.tenant().size() > kMaxFullTenantBytes) {
      return absl::InvalidArgumentError(absl::StrCat("tenant is ", request.tenant().size(),
                                                     " bytes long; at most ", kMaxFullTenantBytes,
                                                     " are allowed"));
    }
    const int64_t held = registry_.RegionsOf(id);
    if (held >= options_.max_regions_per_connection) {
      return absl::ResourceExhaustedError(absl::StrCat("the connection has ", held, " regions; ",
                                                       options_.max_regions_per_connection,
                                                       " are allowed"));
    }
    transport::NewRegion region = {.size_bytes = request.size_bytes(),
                                   .writable = request.writable(),
                                   .tenant = Identity::LocalTenant(request.tenant()),
                                   .owner = connections_.at(id)->owner,
                                   .connection = id};
    if (request.lease_millis() != 0) region.lease = transport::LeaseOf(request.lease_millis());
    return registry_.AddDescriptor(std::move(files.front()), region);
  }

  // False: the client does not read.
  static bool Answer(Connection& connection,
                     const absl::StatusOr<transport::RegisteredRegion>& region) {
    v1::RegisterDescriptorResponse response;
    if (region.ok()) {
      response.set_handle(region->handle);
      response.set_lease_millis(static_cast<uint64_t>(
          absl::ToInt64Milliseconds(region->lease.value_or(absl::ZeroDuration()))));
    } else {
      const grpc::Status status = ToGrpc(region.status());
      response.set_code(static_cast<uint32_t>(status.error_code()));
      response.set_message(status.error_message());
    }
    const std::string bytes = response.SerializeAsString();
    // An answer is never empty: it has a handle or a code.
    return send(connection.socket.native_handle(), bytes.data(), bytes.size(),
                MSG_DONTWAIT | MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size());
  }

  void Close(int64_t id) {
    connections_.erase(id);
    registry_.EndConnection(id);
  }

  const RegionSocketOptions options_;
  transport::RegionRegistry& registry_;
  boost::asio::io_context& io_;
  Descriptor listening_;
  boost::asio::steady_timer accept_pause_;
  std::unordered_map<int64_t, std::unique_ptr<Connection>> connections_;
  int64_t last_id_ = 0;
};

absl::StatusOr<std::unique_ptr<RegionSocket>> RegionSocket::Listen(
    const RegionSocketOptions& options, transport::RegionRegistry* registry,
    boost::asio::io_context* io) {
  absl::StatusOr<FileDescriptor> listening = Bind(options.path);
  if (!listening.ok()) return listening.status();
  return std::unique_ptr<RegionSocket>(
      new RegionSocket(std::make_unique<Impl>(options, *std::move(listening), registry, io)));
}

RegionSocket::RegionSocket(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
RegionSocket::~RegionSocket() = default;

}  // namespace structkv::rpc
