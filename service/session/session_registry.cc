#include "service/session/session_registry.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace structkv::session {

SessionRegistry::Added SessionRegistry::Add(const std::string& id, const std::string& key,
                                            const std::shared_ptr<SessionCore>& core,
                                            int64_t max_sessions) {
  const std::lock_guard lock(mutex_);
  if (draining_) return Added::kDraining;
  if (!key.empty() && by_key_.contains(key)) return Added::kKeyTaken;
  if (static_cast<int64_t>(sessions_.size()) >= max_sessions) return Added::kFull;
  sessions_.emplace(id, Entry{key, core});
  if (!key.empty()) by_key_.emplace(key, id);
  return Added::kYes;
}

void SessionRegistry::ForgetKeyLocked(const std::string& id, Entry& entry) {
  const auto found = by_key_.find(entry.key);
  if (found != by_key_.end() && found->second == id) by_key_.erase(found);
  entry.key.clear();
}

void SessionRegistry::Remove(const std::string& id) {
  const std::lock_guard lock(mutex_);
  const auto found = sessions_.find(id);
  if (found == sessions_.end()) return;
  ForgetKeyLocked(id, found->second);
  sessions_.erase(found);
  removed_.notify_all();
}

void SessionRegistry::ForgetKey(const std::string& id) {
  const std::lock_guard lock(mutex_);
  const auto found = sessions_.find(id);
  if (found != sessions_.end()) ForgetKeyLocked(id, found->second);
}

std::shared_ptr<SessionCore> SessionRegistry::FindKey(const std::string& key) const {
  const std::lock_guard lock(mutex_);
  const auto found = by_key_.find(key);
  return found == by_key_.end() ? nullptr : sessions_.at(found->second).core.lock();
}

std::vector<std::shared_ptr<SessionCore>> SessionRegistry::All() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<SessionCore>> all;
  all.reserve(sessions_.size());
  for (const auto& [id, entry] : sessions_) {
    if (auto core = entry.core.lock()) all.push_back(std::move(core));
  }
  return all;
}

int64_t SessionRegistry::size() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int64_t>(sessions_.size());
}

void SessionRegistry::StartDraining() {
  const std::lock_guard lock(mutex_);
  draining_ = true;
}

bool SessionRegistry::draining() const {
  const std::lock_guard lock(mutex_);
  return draining_;
}

template <typename Done>
bool SessionRegistry::Wait(absl::Duration limit, Done done) const {
  // A day is as good as for ever, and does not overflow the clock.
  const absl::Duration bounded = std::clamp(limit, absl::ZeroDuration(), absl::Hours(24));
  const auto end = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(bounded);
  std::unique_lock lock(mutex_);
  return removed_.wait_until(lock, end, done);
}

bool SessionRegistry::WaitRemoved(const std::string& id, absl::Duration limit) const {
  return Wait(limit, [&] { return !sessions_.contains(id); });
}

bool SessionRegistry::WaitEmpty(absl::Duration limit) const {
  return Wait(limit, [&] { return sessions_.empty(); });
}

}  // namespace structkv::session
