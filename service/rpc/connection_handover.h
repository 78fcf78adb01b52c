// Gives connections to gRPC, which may go on to read of one on the thread that brings it, for as
// long as its peer sends without a pause: a thread that others wait for may not be that one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/server_builder.h"

namespace structkv::rpc {

// Thread-safe. Has some threads, and more where connections keep these: one more in each kPatience,
// so that a crowd of connections, which are quickly handed over, makes few.
class ConnectionHandover {
 public:
  using Acceptor = grpc::experimental::ExternalConnectionAcceptor;

  ConnectionHandover() = default;
  // Waits until gRPC has let go of the threads: its server is shut down.
  ~ConnectionHandover();
  ConnectionHandover(const ConnectionHandover&) = delete;
  ConnectionHandover& operator=(const ConnectionHandover&) = delete;

  static constexpr size_t kThreads = 8;
  static constexpr absl::Duration kPatience = absl::Milliseconds(20);

  // Takes the descriptor. `acceptor` outlives this object.
  void Give(Acceptor* acceptor, int fd);
  // To be called now and then: adds a thread where a connection waits for one too long.
  void Look();

 private:
  struct Connection {
    Acceptor* acceptor = nullptr;
    int fd = -1;
    int64_t since = 0;  // SteadyNanos()
  };
  void Run();
  void AddThreadIfDue() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  absl::Mutex mutex_;
  std::deque<Connection> waiting_ ABSL_GUARDED_BY(mutex_);
  size_t idle_ ABSL_GUARDED_BY(mutex_) = 0;    // threads, those that begin among them
  int64_t added_ ABSL_GUARDED_BY(mutex_) = 0;  // when the last thread was, SteadyNanos()
  bool over_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace structkv::rpc
