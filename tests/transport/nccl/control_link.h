// A control stream within one process: messages go through the wire's form, on a thread of the
// link. It may go, as a gRPC stream may, while either end still has something to say to it.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
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
  void DropFinished();
  // Ends the stream under both, as where a proxy does.
  void Break();
  // Hands a message to the service as if the client had sent it.
  void SendAsClient(const ClientMessage& message);

 private:
  // What the two ends hold, also after the link is gone.
  struct State {
    // Dropped once the link goes.
    void Post(std::function<void()> deliver);
    void SetEnded(const absl::Status& status);

    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> queue;
    bool stopping = false;
    bool cut = false;
    bool drop_finished = false;
    std::optional<absl::StatusOr<uint64_t>> attached;
    std::optional<absl::Status> ended;
  };

  // What the link's thread does with a message of the client's.
  static std::function<void()> Delivery(ControlLink* link, const ClientMessage& message);
  void Run();

  Hub* const hub_;
  Hub::PairId pair_ = 0;
  std::shared_ptr<ClientPair> client_;
  const std::shared_ptr<State> state_ = std::make_shared<State>();
  std::thread thread_;
};

}  // namespace structkv::nccl::testing
