#include "tests/session/group_model.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace structkv::session {

GroupModel::GroupModel(std::string id, int64_t ranks, int64_t layers, std::optional<Bad> bad)
    : id_(std::move(id)), layers_(layers), bad_(bad), ranks_(static_cast<size_t>(ranks)) {}

void GroupModel::Join(int64_t rank) {
  At(rank).joined = true;
  const bool all =
      std::all_of(ranks_.begin(), ranks_.end(), [](const Rank& r) { return r.joined; });
  if (all) state_ = State::kRunning;
  GoOn();
}

void GroupModel::Send(int64_t rank) {
  ++At(rank).sent;
  GoOn();
}

void GroupModel::Commit(int64_t rank) {
  At(rank).committed = true;
  GoOn();
}

void GroupModel::Release(int64_t rank) { At(rank) = {}; }

void GroupModel::Leave(int64_t rank, std::optional<absl::StatusCode> code) {
  FailAll(absl::StatusCode::kAborted);
  At(rank).failed = code;
  culprit_ = rank;
  cause_ = absl::StrCat("shard ", rank, " of the group '", id_, "' ended: ",
                        absl::StatusCodeToString(code.value_or(absl::StatusCode::kCancelled)));
}

void GroupModel::EndWait(absl::StatusCode code) { FailAll(code); }

void GroupModel::GoOn() {
  if (!running()) return;
  while (std::all_of(ranks_.begin(), ranks_.end(),
                     [this](const Rank& rank) { return rank.sent > answered_; })) {
    if (bad_.has_value() && bad_->layer == answered_) {
      if (bad_->shared) {
        FailAll(absl::StatusCode::kInvalidArgument);
      } else {
        Leave(bad_->rank, absl::StatusCode::kInvalidArgument);
      }
      return;
    }
    ++answered_;
  }
  if (answered_ < layers_) return;
  if (!std::all_of(ranks_.begin(), ranks_.end(), [](const Rank& r) { return r.committed; })) return;
  finished_ = true;
  state_ = State::kOver;
}

void GroupModel::FailAll(absl::StatusCode code) {
  state_ = State::kOver;
  for (Rank& rank : ranks_) {
    if (rank.joined) rank.failed = code;
  }
}

}  // namespace structkv::session
