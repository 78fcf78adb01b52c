#include "service/session/shard_groups.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace structkv::session {

absl::StatusOr<std::shared_ptr<ShardGroup>> ShardGroups::Find(const SessionRequest& request,
                                                              const SessionHost& host) {
  std::shared_ptr<ShardGroup> group;
  if (!request.shard->group_id.empty()) {
    const std::lock_guard lock(mutex_);
    if (!ended_.ok()) return ended_;
    Entry& entry = groups_[KeyOf(request)];
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

std::string ShardGroups::KeyOf(const SessionRequest& request) {
  const std::string& tenant = request.transport.tenant;
  return absl::StrCat(tenant.size(), " ", tenant, request.shard->group_id);
}

void ShardGroups::Remove(const std::string& key, const ShardGroup* group) {
  const std::lock_guard lock(mutex_);
  const auto found = groups_.find(key);
  if (found != groups_.end() && found->second.group == group) groups_.erase(found);
}

void ShardGroups::EndWaiting(const absl::Status& status) {
  std::vector<std::shared_ptr<ShardGroup>> groups;
  {
    const std::lock_guard lock(mutex_);
    ended_ = status;
    for (const auto& [key, entry] : groups_) {
      if (auto group = entry.weak.lock()) groups.push_back(std::move(group));
    }
  }
  for (const std::shared_ptr<ShardGroup>& group : groups) group->EndWait(status);
}

}  // namespace structkv::session
