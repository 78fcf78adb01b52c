// The sessions of a server that hold memory, by id and by idempotency key.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"

namespace structkv::session {

class SessionCore;

// Thread-safe. Shared by the manager and its sessions.
class SessionRegistry {
 public:
  // What became of an attempt to register.
  enum class Added : uint8_t { kYes, kFull, kDraining, kKeyTaken };

  // Registers a session until Remove(). kFull at `max_sessions`.
  Added Add(const std::string& id, const std::string& key, const std::shared_ptr<SessionCore>& core,
            int64_t max_sessions);
  // Called once a session's memory is back.
  void Remove(const std::string& id);
  // Frees the key of a session that runs no longer.
  void ForgetKey(const std::string& id);

  // The running session with this key, or null.
  std::shared_ptr<SessionCore> FindKey(const std::string& key) const;
  std::vector<std::shared_ptr<SessionCore>> All() const;
  int64_t size() const;

  void StartDraining();
  bool draining() const;

  // Wait until that session, or all of them, were removed; false after `limit`.
  bool WaitRemoved(const std::string& id, absl::Duration limit) const;
  bool WaitEmpty(absl::Duration limit) const;

 private:
  struct Entry {
    std::string key;
    std::weak_ptr<SessionCore> core;
  };

  template <typename Done>
  bool Wait(absl::Duration limit, Done done) const;
  void ForgetKeyLocked(const std::string& id, Entry& entry);

  mutable std::mutex mutex_;
  mutable std::condition_variable removed_;
  absl::flat_hash_map<std::string, Entry> sessions_;      // by id
  absl::flat_hash_map<std::string, std::string> by_key_;  // id by key
  bool draining_ = false;
};

}  // namespace structkv::session
