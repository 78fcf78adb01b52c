// What the two ends of a pair say to each other beside the data: proto/structkv/v1/nccl.proto
// without protobuf. See there for what each message means.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "service/transport/nccl/handshake.h"
#include "service/transport/nccl/transfer.h"

namespace structkv::nccl {

inline constexpr size_t kMaxKeyBytes = 128;
// Offers of a pair that wait for the service's word: some 400 bytes each.
inline constexpr size_t kMaxWaitingOffers = 1024;
// A prompt's transfers have two.
inline constexpr size_t kMaxBuffersPerTransfer = 8;
// Far more than a GPU has; sums of lengths cannot overflow.
inline constexpr int64_t kMaxBufferBytes = int64_t{1} << 40;

// Both ways.
struct Heartbeat {};

// Client to service.
using Hello = Identity;
struct Join {
  uint64_t generation = 0;
  UniqueId id;
};
struct Offer {
  std::string key;
  Direction direction = Direction::kSend;  // as the client sees it
  std::vector<int64_t> lengths;
};
struct Finished {
  uint64_t sequence = 0;
};
struct Broken {
  std::string why;
};
struct Withdraw {
  std::string key;
};
using ClientMessage = std::variant<Hello, Join, Offer, Finished, Heartbeat, Broken, Withdraw>;

// Service to client.
struct Welcome {
  Identity identity;
  uint64_t pair = 0;
  absl::Duration heartbeat_interval;
};
struct Connect {
  uint64_t generation = 0;
};
struct Order {
  uint64_t generation = 0;
  uint64_t sequence = 0;
  std::string key;
};
struct Refused {
  std::string key;
  absl::Status why;
};
struct Close {
  uint64_t generation = 0;
};
using ServiceMessage = std::variant<Welcome, Connect, Order, Refused, Close, Heartbeat>;

// One end's way to the other, in order. Neither function blocks; both are called from any thread,
// one at a time, without a lock. What is sent after `end` is dropped.
template <typename Message>
struct Channel {
  std::function<void(Message)> send;
  // Ends the control stream after what was sent. The client learns the service's status, the
  // service that it is over.
  std::function<void(const absl::Status&)> end;
};

template <class... Functions>
struct Overloaded : Functions... {
  using Functions::operator()...;
};
template <class... Functions>
Overloaded(Functions...) -> Overloaded<Functions...>;

}  // namespace structkv::nccl
