// The unix socket over which clients pass descriptors to be registered (region.proto).
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "service/transport/region_registry.h"

namespace boost::asio {
class io_context;
}

namespace structkv::rpc {

struct RegionSocketOptions {
  std::string path;
  int max_connections = 256;
  int max_regions_per_connection = 64;
  // A connection that holds no region is closed after this.
  absl::Duration idle_limit = absl::Seconds(10);
};

// Runs on the thread that runs the context; stop that before destroying this. What a connection has
// registered is unregistered when it closes.
class RegionSocket {
 public:
  // Listens. UNAVAILABLE where the path cannot be had: another server answers there, it is no
  // socket, or not permitted. `io` and `registry` outlive the object.
  static absl::StatusOr<std::unique_ptr<RegionSocket>> Listen(const RegionSocketOptions& options,
                                                              transport::RegionRegistry* registry,
                                                              boost::asio::io_context* io);
  // Closes all connections, and removes the path.
  ~RegionSocket();
  RegionSocket(const RegionSocket&) = delete;
  RegionSocket& operator=(const RegionSocket&) = delete;

 private:
  class Impl;
  explicit RegionSocket(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace structkv::rpc
