// Takes connections to TCP addresses and hands them to gRPC, no more than a number at once:
// gRPC 1.51 has no such limit, and takes memory for each connection before anything is known of it.
// Those whose peers open far more streams than they may are broken: gRPC 1.51 takes memory for each
// of these too, and no service learns of one whose request does not come.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/server_builder.h"
#include "service/rpc/log.h"

namespace structkv::rpc {

// INVALID_ARGUMENT for what is neither "host:port" ("[::1]:80" is IPv6) nor "unix:/path" nor
// "unix-abstract:name".
absl::Status CheckListenAddress(const std::string& address);

// Thread-safe. Runs two threads between Start() and Stop().
class ConnectionListener {
 public:
  struct Place {
    std::string address;  // "host:port"
    std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> acceptor;
  };

  struct Limits {
    int64_t connections = 0;
    // Streams at once of one connection, beyond which it is broken within a tenth of a second, or
    // somewhat later where there are thousands of connections; 0: no limit.
    int64_t streams = 0;
    // What a peer has not acknowledged for this breaks its connection.
    absl::Duration ack;
  };

  // UNAVAILABLE where an address cannot be listened on. A host's name stands for all its addresses.
  // `warnings` may be null.
  static absl::StatusOr<std::unique_ptr<ConnectionListener>> Bind(std::vector<Place> places,
                                                                  const Limits& limits,
                                                                  std::shared_ptr<Log> warnings);
  ~ConnectionListener();
  ConnectionListener(const ConnectionListener&) = delete;
  ConnectionListener& operator=(const ConnectionListener&) = delete;

  // Of the places, in their order.
  const std::vector<int>& ports() const;
  // Begins to take connections; gRPC's server runs.
  void Start();
  // Takes no more of them. Once, or by the destructor.
  void Stop();

  // Those that gRPC has now.
  int64_t connections() const;
  // Those that were closed because there were as many as there may be.
  int64_t refused() const;
  // Those that were broken for their streams.
  int64_t broken() const;

 private:
  class Impl;
  explicit ConnectionListener(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace structkv::rpc
