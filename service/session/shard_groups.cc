#include "service/session/shard_groups.h"

#include <utility>
#include <vector>

namespace structkv::session {

absl::StatusOr<std::shared_ptr<ShardGroup>> ShardGroups::Find(const SessionRequest& request,
                                                              const SessionHost& host) {
  const std::string& id = request.shard->group_id;
  std::shared_ptr<ShardGroup> group;
  if (!id.empty()) {
    const std::lock_guard lock(mutex_);
    if (!ended_.ok()) return ended_;
    Entry& entry = groups_[id];
    group = entry.weak.lock();
    if (group == nullptr) {
      group = std::make_shared<ShardGroup>(request, host);
      entry = {.group = group.get(), .weak = group};
      return group;
    }
  } else {
    return std::make_shared<ShardGroup>(request, host);
  }
  if (absl::Status fits = group->Check(request); !fits.ok()) return fits;
  return group;
}

void ShardGroups::Remove(const std::string& id, const ShardGroup* group) {
  const std::lock_guard lock(mutex_);
  const auto found = groups_.find(id);
  if (found != groups_.end() && found->second.group == group) groups_.erase(found);
}

void ShardGroups::EndWaiting(const absl::Status& status) {
  std::vector<std::shared_ptr<ShardGroup>> groups;
  {
    const std::lock_guard lock(mutex_);
    ended_ = status;
    for (const auto& [id, entry] : groups_) {
      if (auto group = entry.weak.lock()) groups.push_back(std::move(group));
    }
  }
  for (const std::shared_ptr<ShardGroup>& group : groups) group->EndWait(status);
}

}  // namespace structkv::session
