// A TCP proxy that breaks connections after some bytes, as networks do.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

namespace structkv::testkit {

// Listens on 127.0.0.1 and passes bytes on to port `to` there. Connection i is broken once
// `cuts[i]` bytes have come back from the server; those beyond `cuts` live.
class CuttingProxy {
 public:
  CuttingProxy(int to, std::vector<uint64_t> cuts);
  ~CuttingProxy();
  CuttingProxy(const CuttingProxy&) = delete;
  CuttingProxy& operator=(const CuttingProxy&) = delete;

  std::string target() const { return "127.0.0.1:" + std::to_string(port_); }
  int connections() const { return connections_.load(); }

 private:
  void Accept();
  void Pump(int client, uint64_t cut) const;

  const int to_;
  const std::vector<uint64_t> cuts_;
  int listener_ = -1;
  int port_ = 0;
  std::atomic<bool> stopped_{false};
  std::atomic<int> connections_{0};
  std::vector<std::thread> pumps_;  // touched by the acceptor, and by the destructor after it
  std::thread acceptor_;
};

}  // namespace structkv::testkit
