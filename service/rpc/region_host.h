// What a server does for regions beside its calls: the region socket, leases that end, and files
// whose creators are gone, on one thread.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "service/rpc/region_socket.h"
#include "service/transport/region_registry.h"

namespace structkv::rpc {

struct RegionHostOptions {
  RegionSocketOptions socket;
  transport::RegionOptions regions;
  // Called, on the host's thread, with what an operator should know. May be null.
  std::function<void(const std::string&)> warn;
};

class RegionHost {
 public:
  // As RegionSocket::Listen.
  static absl::StatusOr<std::unique_ptr<RegionHost>> Start(
      const RegionHostOptions& options, std::shared_ptr<transport::RegionRegistry> registry);
  // Unregisters what connections have registered.
  ~RegionHost();
  RegionHost(const RegionHost&) = delete;
  RegionHost& operator=(const RegionHost&) = delete;

 private:
  class Impl;
  explicit RegionHost(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace structkv::rpc
