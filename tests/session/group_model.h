// What the ranks of a shard group must come to, as plain as can be: a layer is answered once every
// rank has sent it, and the ranks finish or fail together.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace structkv::session {

// One group from its first rank to its end; a later rank of the same name begins another. Every
// rank sends its layers in order, and takes its answers at once.
class GroupModel {
 public:
  // A layer that cannot be scored. Where ranks share its heads nobody can say whose fault it is.
  struct Bad {
    int64_t rank = 0;
    int64_t layer = 0;
    bool shared = false;
  };
  GroupModel(std::string id, int64_t ranks, int64_t layers, std::optional<Bad> bad);

  // Events.
  void Join(int64_t rank);
  void Send(int64_t rank);  // its next layer
  void Commit(int64_t rank);
  // A rank of a waiting group gives up its place.
  void Release(int64_t rank);
  // The rank fails, or without a code is cancelled.
  void Leave(int64_t rank, std::optional<absl::StatusCode> code);
  // The waiting group ends.
  void EndWait(absl::StatusCode code);

  bool joined(int64_t rank) const { return At(rank).joined; }
  int64_t sent(int64_t rank) const { return At(rank).sent; }
  bool committed(int64_t rank) const { return At(rank).committed; }
  bool waiting() const { return state_ == State::kWaiting; }
  bool running() const { return state_ == State::kRunning; }
  bool over() const { return state_ == State::kOver; }
  // Layers that each rank has the answer of.
  int64_t answered() const { return answered_; }
  bool finished() const { return finished_; }
  // How the rank failed, if it did.
  std::optional<absl::StatusCode> failed(int64_t rank) const { return At(rank).failed; }
  // The rank with which the others ended as ABORTED, and what their text says.
  std::optional<int64_t> culprit() const { return culprit_; }
  const std::string& cause() const { return cause_; }

 private:
  enum class State : uint8_t { kWaiting, kRunning, kOver };
  struct Rank {
    bool joined = false;
    int64_t sent = 0;
    bool committed = false;
    std::optional<absl::StatusCode> failed;
  };
  const Rank& At(int64_t rank) const { return ranks_[static_cast<size_t>(rank)]; }
  Rank& At(int64_t rank) { return ranks_[static_cast<size_t>(rank)]; }
  void GoOn();
  void FailAll(absl::StatusCode code);

  const std::string id_;
  const int64_t layers_;
  const std::optional<Bad> bad_;
  State state_ = State::kWaiting;
  std::vector<Rank> ranks_;
  int64_t answered_ = 0;
  bool finished_ = false;
  std::optional<int64_t> culprit_;
  std::string cause_;
};

}  // namespace structkv::session
