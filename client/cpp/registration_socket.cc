// Registers a descriptor over the server's region socket.
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/registration.h"
#include "structkv/v1/region.pb.h"

namespace structkv::client::internal {
namespace {

constexpr size_t kMaxPacketBytes = 4096;

absl::Status Unreachable(const std::string& path, const char* what, int error) {
  return absl::UnavailableError(
      absl::StrCat("region socket ", path, ": ", what, ": ", strerror(error)));
}

// Of what waits on the socket from now on; `option` is SO_SNDTIMEO or SO_RCVTIMEO.
void SetLimit(int socket, int option, absl::Time deadline) {
  const timeval limit =
      absl::ToTimeval(std::max(deadline - absl::Now(), absl::Milliseconds(1)));  // 0: none
  setsockopt(socket, SOL_SOCKET, option, &limit, sizeof(limit));
}

class Socket {
 public:
  Socket() = default;
  explicit Socket(int descriptor) : descriptor_(descriptor) {}
  ~Socket() { Reset(); }
  Socket(Socket&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  int get() const { return descriptor_; }
  void Reset() {
    if (descriptor_ >= 0) close(descriptor_);
    descriptor_ = -1;
  }

 private:
  int descriptor_ = -1;
};

class SocketRegistration final : public Registration {
 public:
  SocketRegistration(std::string handle, Socket socket)
      : Registration(std::move(handle)), socket_(std::move(socket)), process_(getpid()) {}

  ~SocketRegistration() override {
    // Also where a forked child has the connection too; not from within that child.
    if (process_ == getpid()) shutdown(socket_.get(), SHUT_RDWR);
  }

  // The server says nothing unasked: what can be read is the end.
  bool holds() override {
    pollfd poll_one = {socket_.get(), POLLIN | POLLRDHUP, 0};
    return poll(&poll_one, 1, 0) == 0;
  }

 private:
  Socket socket_;
  const pid_t process_;
};

absl::StatusOr<Socket> ConnectTo(const std::string& path, absl::Time deadline) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat("region socket ", path, ": the path has ",
                                                   path.size(), " bytes; a socket's has at most ",
                                                   sizeof(address.sun_path) - 1));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  Socket socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (socket.get() < 0) return Unreachable(path, "no socket", errno);
  SetLimit(socket.get(), SO_SNDTIMEO, deadline);
  if (connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return Unreachable(path, "connecting", errno);
  }
  return socket;
}

// Sends one packet with one descriptor.
bool SendWith(int socket, std::string* packet, int descriptor) {
  iovec part = {packet->data(), packet->size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &descriptor, sizeof(descriptor));
  return sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(packet->size());
}

}  // namespace

absl::StatusOr<std::unique_ptr<Registration>> RegisterDescriptor(const RegionServer& server,
                                                                 const RegionOptions& options,
                                                                 int descriptor,
                                                                 absl::Time deadline) {
  absl::StatusOr<Socket> socket = ConnectTo(server.socket, deadline);
  if (!socket.ok()) return socket.status();
  v1::RegisterDescriptorRequest request;
  request.set_size_bytes(options.size_bytes);
  request.set_writable(options.writable);
  request.set_tenant(server.caller.empty() ? absl::StrCat("name:", server.tenant) : server.caller);
  std::string packet = request.SerializeAsString();
  if (!SendWith(socket->get(), &packet, descriptor)) {
    return Unreachable(server.socket, "sending the descriptor", errno);
  }
  SetLimit(socket->get(), SO_RCVTIMEO, deadline);
  std::array<char, kMaxPacketBytes> buffer;
  const ssize_t size = recv(socket->get(), buffer.data(), buffer.size(), 0);
  if (size < 0) return Unreachable(server.socket, "reading the answer", errno);
  if (size == 0) return Unreachable(server.socket, "closed by the server", ECONNRESET);
  v1::RegisterDescriptorResponse response;
  if (!response.ParseFromArray(buffer.data(), static_cast<int>(size))) {
    return absl::DataLossError(
        absl::StrCat("region socket ", server.socket, ": the server's answer cannot be read"));
  }
  if (response.code() != 0) {
    return absl::Status(static_cast<absl::StatusCode>(response.code()), response.message());
  }
  return std::make_unique<SocketRegistration>(response.handle(), *std::move(socket));
}

}  // namespace structkv::client::internal
