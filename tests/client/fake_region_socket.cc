#include "tests/client/fake_region_socket.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>

namespace structkv::client {

FakeRegionSocket::FakeRegionSocket() : path_(directory_.Path("regions")) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path_.data(), path_.size());
  listener_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0 ||
      listen(listener_, 16) != 0 || pipe2(stop_, O_CLOEXEC) != 0) {
    std::abort();
  }
  thread_ = std::thread([this] { Serve(); });
}

FakeRegionSocket::~FakeRegionSocket() {
  close(stop_[1]);
  thread_.join();
  CloseConnections();
  close(stop_[0]);
  close(listener_);
}

void FakeRegionSocket::Refuse(uint32_t code, const std::string& message) {
  absl::MutexLock lock(&mutex_);
  refusal_ = code;
  refusal_text_ = message;
}

void FakeRegionSocket::CloseConnections() {
  absl::MutexLock lock(&mutex_);
  for (const int connection : connections_) close(connection);
  connections_.clear();
}

std::vector<RegisteredRegion> FakeRegionSocket::regions() const {
  absl::MutexLock lock(&mutex_);
  return regions_;
}

int FakeRegionSocket::connections() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int>(std::count_if(connections_.begin(), connections_.end(), [](int fd) {
    pollfd one = {fd, POLLRDHUP, 0};
    return poll(&one, 1, 0) == 0;
  }));
}

void FakeRegionSocket::Serve() {
  while (true) {
    pollfd two[] = {{listener_, POLLIN, 0}, {stop_[0], POLLIN, 0}};
    poll(two, 2, -1);
    if (two[1].revents != 0) return;
    const int connection = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    const std::string answer = Register(connection).SerializeAsString();
    absl::MutexLock lock(&mutex_);
    connections_.push_back(connection);
    send(connection, answer.data(), answer.size(), MSG_NOSIGNAL);
  }
}

v1::RegisterDescriptorResponse FakeRegionSocket::Register(int connection) {
  std::array<char, 4096> packet;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
  iovec part = {packet.data(), packet.size()};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t size = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);
  int descriptor = -1;
  if (const cmsghdr* header = CMSG_FIRSTHDR(&message)) {
    std::memcpy(&descriptor, CMSG_DATA(header), sizeof(descriptor));
  }
  RegisteredRegion region;
  v1::RegisterDescriptorResponse response;
  if (size < 0 || !region.request.ParseFromArray(packet.data(), static_cast<int>(size))) {
    response.set_code(3);
    return response;
  }
  const size_t bytes = region.request.size_bytes();
  region.seals = fcntl(descriptor, F_GET_SEALS);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  close(descriptor);
  region.memory = {static_cast<std::byte*>(memory), [bytes](std::byte* m) { munmap(m, bytes); }};
  absl::MutexLock lock(&mutex_);
  response.set_code(refusal_);
  response.set_message(refusal_text_);
  if (refusal_ != 0) return response;
  response.set_handle(std::string(16, static_cast<char>('a' + regions_.size())));
  regions_.push_back(std::move(region));
  return response;
}

}  // namespace structkv::client
