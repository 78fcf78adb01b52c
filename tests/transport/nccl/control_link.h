// A control stream within one process: messages go through the wire's form, on a thread of the
// link.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "service/transport/nccl/client_pair.h"
#include "service/transport/nccl/hub.h"

namespace structkv::nccl::testing {

class ControlLink {
 public:
  // Attaches a client to the hub. Both outlive the link.
  ControlLink(Hub* hub, Worker* client, const Identity& identity);
  // Ends the pair.
  ~ControlLink();

  ClientPair* client() const { return client_.get(); }
  Hub::PairId pair() const { return pair_; }
  // The pair's name, or why it was refused.
  absl::StatusOr<uint64_t> WaitAttached();
  // The status with which the service ended the stream.
  absl::Status WaitEnded();
  // Drops everything in both directions, as where the network is cut.
  void Cut();
  // Drops what the client says of the ends of transfers.
  void DropFinished() { drop_finished_ = true; }
  // Ends the stream under both, as where a proxy does.
  void Break();
  // Hands a message to the service as if the client had sent it.
  void SendAsClient(ClientMessage message);

 private:
  void Post(std::function<void()> deliver);
  void Run();

  Hub* const hub_;
  Hub::PairId pair_ = 0;
  std::shared_ptr<ClientPair> client_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool stopping_ = false;
  bool cut_ = false;
  std::atomic<bool> drop_finished_ = false;
  bool attached_set_ = false;
  bool ended_set_ = false;
  absl::StatusOr<uint64_t> attached_ = absl::UnknownError("");
  absl::Status ended_;

  std::thread thread_;
};

}  // namespace structkv::nccl::testing
