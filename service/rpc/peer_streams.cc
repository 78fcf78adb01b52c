#include "service/rpc/peer_streams.h"

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace structkv::rpc {

struct PeerStreams::State {
  explicit State(int64_t most) : limit(most) {}

  const int64_t limit;
  absl::Mutex mutex;
  absl::flat_hash_map<std::string, int64_t> streams ABSL_GUARDED_BY(mutex);  // none of 0
  RefusedStreams refused ABSL_GUARDED_BY(mutex);
};

PeerStreams::PeerStreams(int64_t limit) : state_(std::make_shared<State>(limit)) {}

absl::StatusOr<PeerStreams::Place> PeerStreams::Take(const std::string& peer) const {
  const bool shared = absl::StartsWith(peer, "unix");
  const int64_t most = state_->limit * (shared ? kUnixConnections : 1);
  const std::string key = shared ? "unix:" : peer;
  {
    absl::MutexLock lock(&state_->mutex);
    const auto found = state_->streams.find(key);
    const int64_t count = found == state_->streams.end() ? 0 : found->second;
    if (most > 0 && count >= most) {
      ++(shared ? state_->refused.unix_sockets : state_->refused.connection);
      return absl::ResourceExhaustedError(absl::StrCat(
          shared ? "the connections to unix sockets have " : "the connection has ", count,
          " streams; ", most,
          shared ? absl::StrCat(" are allowed (", kUnixConnections, " times max-streams-per-peer)")
                 : std::string(" are allowed (max-streams-per-peer)")));
    }
    state_->streams[key] = count + 1;
  }
  const auto give_back = [state = state_, key](const void* /*nothing*/) {
    absl::MutexLock lock(&state->mutex);
    const auto at = state->streams.find(key);
    if (--at->second == 0) state->streams.erase(at);
  };
  return Place(state_.get(), give_back);
}

RefusedStreams PeerStreams::refused() const {
  absl::MutexLock lock(&state_->mutex);
  return state_->refused;
}

}  // namespace structkv::rpc
