// Gives connections to gRPC, which may go on to read of one on the thread that brings it, for as
// long as its peer sends without a pause: a thread that others wait for may not be that one.
#pragma once

#include <deque>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/server_builder.h"

namespace structkv::rpc {

// Thread-safe. Has as many threads as connections were read of at once, and keeps them.
class ConnectionHandover {
 public:
  using Acceptor = grpc::experimental::ExternalConnectionAcceptor;

  ConnectionHandover() = default;
  // Waits until gRPC has let go of the threads: its server is shut down.
  ~ConnectionHandover();
  ConnectionHandover(const ConnectionHandover&) = delete;
  ConnectionHandover& operator=(const ConnectionHandover&) = delete;

  // Takes the descriptor. `acceptor` outlives this object.
  void Give(Acceptor* acceptor, int fd);

 private:
  struct Connection {
    Acceptor* acceptor;
    int fd;
  };
  void Run();

  absl::Mutex mutex_;
  std::deque<Connection> waiting_ ABSL_GUARDED_BY(mutex_);
  size_t idle_ ABSL_GUARDED_BY(mutex_) = 0;  // threads, those that begin among them
  bool over_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace structkv::rpc
