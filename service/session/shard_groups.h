// The groups of a server, by tenant and id.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/session/shard_group.h"

namespace structkv::session {

// Thread-safe.
class ShardGroups {
 public:
  // The group that `request` may join, or a new one; as ShardGroup::Check. A nameless one is always
  // new.
  absl::StatusOr<std::shared_ptr<ShardGroup>> Find(const SessionRequest& request,
                                                   const SessionHost& host);
  // What a rank's group is known by: its id, among those of its tenant.
  static std::string KeyOf(const SessionRequest& request);
  // The key no longer leads to that group.
  void Remove(const std::string& key, const ShardGroup* group);
  // Ends those that wait, now and later.
  void EndWaiting(const absl::Status& status);

 private:
  struct Entry {
    const ShardGroup* group = nullptr;
    std::weak_ptr<ShardGroup> weak;
  };
  std::mutex mutex_;
  absl::flat_hash_map<std::string, Entry> groups_;
  absl::Status ended_;  // not OK: none may be made
};

}  // namespace structkv::session
