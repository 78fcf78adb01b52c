#include "tests/testing/cutting_proxy.h"

#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <utility>

namespace structkv::testkit {
namespace {

constexpr int kLookMillis = 20;

sockaddr_in Local(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  return address;
}

[[noreturn]] void Die(const char* what) {
  std::perror(what);
  std::exit(1);
}

bool WriteAll(int fd, const char* data, ssize_t size) {
  while (size > 0) {
    const ssize_t written = send(fd, data, static_cast<size_t>(size), MSG_NOSIGNAL);
    if (written <= 0) return false;
    data += written;
    size -= written;
  }
  return true;
}

}  // namespace

CuttingProxy::CuttingProxy(int to, std::vector<uint64_t> cuts) : to_(to), cuts_(std::move(cuts)) {
  listener_ = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = Local(0);
  socklen_t length = sizeof(address);
  if (bind(listener_, reinterpret_cast<sockaddr*>(&address), length) != 0 ||
      listen(listener_, 16) != 0 ||
      getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length) != 0) {
    Die("proxy");
  }
  port_ = ntohs(address.sin_port);
  acceptor_ = std::thread([this] { Accept(); });
}

CuttingProxy::~CuttingProxy() {
  stopped_.store(true);
  acceptor_.join();
  for (std::thread& pump : pumps_) pump.join();
  close(listener_);
}

void CuttingProxy::Accept() {
  while (!stopped_.load()) {
    pollfd ready = {listener_, POLLIN, 0};
    if (poll(&ready, 1, kLookMillis) <= 0) continue;
    const int client = accept(listener_, nullptr, nullptr);
    if (client < 0) Die("proxy: accept");
    const auto index = static_cast<size_t>(connections_.fetch_add(1));
    const uint64_t cut = index < cuts_.size() ? cuts_[index] : ~uint64_t{0};
    pumps_.emplace_back([this, client, cut] { Pump(client, cut); });
  }
}

void CuttingProxy::Pump(int client, uint64_t cut) const {
  const int server = socket(AF_INET, SOCK_STREAM, 0);
  const sockaddr_in address = Local(to_);
  bool open = connect(server, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
  uint64_t passed = 0;
  std::array<char, 64 << 10> buffer;
  while (open && !stopped_.load()) {
    std::array<pollfd, 2> ready = {{{client, POLLIN, 0}, {server, POLLIN, 0}}};
    if (poll(ready.data(), ready.size(), kLookMillis) <= 0) continue;
    for (const pollfd& from : ready) {
      if (from.revents == 0 || !open) continue;
      const ssize_t got = read(from.fd, buffer.data(), buffer.size());
      open = got > 0 && WriteAll(from.fd == client ? server : client, buffer.data(), got);
      if (open && from.fd == server) passed += static_cast<uint64_t>(got);
    }
    open = open && passed < cut;
  }
  close(server);
  close(client);
}

}  // namespace structkv::testkit
