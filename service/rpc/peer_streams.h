// Streams that each peer has at once, of which it may have so many and no more.
//
// HTTP/2 has a limit of its own (max_streams_per_connection), but gRPC 1.51 holds a peer to it only
// once that peer has acknowledged it, which a hostile one never does.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

namespace structkv::rpc {

// Connections to unix sockets have no names of their own (gRPC calls all of them "unix:"), so that
// they share one limit, as high as that of so many connections.
inline constexpr int64_t kUnixConnections = 16;

// Streams that were refused, by whose limit it was.
struct RefusedStreams {
  int64_t connection = 0;
  int64_t unix_sockets = 0;
};

// Thread-safe. Copies share the count.
class PeerStreams {
 public:
  // One stream's part; gives it back when it is destroyed, also after the last PeerStreams.
  using Place = std::shared_ptr<const void>;

  // `limit`: streams at once of one connection; 0: as many as come.
  explicit PeerStreams(int64_t limit);

  // A place for a stream of `peer` (ServerContext::peer()); RESOURCE_EXHAUSTED where it has as many
  // as it may.
  absl::StatusOr<Place> Take(const std::string& peer) const;

  RefusedStreams refused() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace structkv::rpc
