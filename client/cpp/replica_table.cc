#include "client/cpp/replica_table.h"

#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace structkv::client::internal {
namespace {

// The same in every process: ranks must agree.
uint64_t Weight(const std::string& group, const std::string& address) {
  const std::string text = absl::StrCat(group, absl::string_view("\0", 1), address);
  return XXH3_64bits(text.data(), text.size());
}

double ShareOf(double reserved, uint64_t limit) {
  // A replica that does not say its limit counts by what this client has sent there.
  return std::max(0.0, reserved) / (limit == 0 ? 1e15 : static_cast<double>(limit));
}

}  // namespace

void ReplicaTable::SetAddresses(const std::vector<std::string>& addresses) {
  std::map<std::string, Replica> kept;
  for (const std::string& address : addresses) {
    if (kept.contains(address)) continue;
    const auto it = replicas_.find(address);
    kept[address] = it == replicas_.end() ? Replica() : std::move(it->second);
  }
  replicas_ = std::move(kept);
  for (auto prompt = prompts_.begin(); prompt != prompts_.end();) {
    const bool is_over =
        prompt->second.ended.has_value() && !replicas_.contains(prompt->second.address);
    prompt = is_over ? prompts_.erase(prompt) : std::next(prompt);
  }
}

bool ReplicaTable::IsFresh(const Replica& replica, absl::Duration now) const {
  return replica.load.has_value() && now - replica.asked <= options_.load_interval;
}

bool ReplicaTable::IsUsable(const Replica& replica) {
  return replica.failures == 0 && replica.load.has_value() && !replica.load->draining();
}

std::vector<std::string> ReplicaTable::TakeDue(absl::Duration now) {
  std::vector<std::string> due;
  for (auto& [address, replica] : replicas_) {
    const bool is_due = replica.failures > 0 ? now >= replica.ask_again : !IsFresh(replica, now);
    if (replica.asking || !is_due) continue;
    replica.asking = true;
    due.push_back(address);
  }
  return due;
}

void ReplicaTable::OnLoad(const std::string& address, const v1::GetLoadResponse& load,
                          absl::Duration asked) {
  const auto it = replicas_.find(address);
  if (it == replicas_.end()) return;
  Replica& replica = it->second;
  replica.asking = false;
  if (replica.failures > 0 && asked < replica.failed) return;  // said before it failed
  replica.failures = 0;
  replica.load = load;
  replica.asked = asked;
  // What had ended by then is in the answer.
  for (auto prompt = prompts_.begin(); prompt != prompts_.end();) {
    const Prompt& own = prompt->second;
    const bool is_known = own.address == address && own.ended.has_value() && *own.ended <= asked;
    prompt = is_known ? prompts_.erase(prompt) : std::next(prompt);
  }
}

void ReplicaTable::OnFailure(const std::string& address, const absl::Status& status,
                             absl::Duration asked, absl::Duration now) {
  const auto it = replicas_.find(address);
  if (it == replicas_.end()) return;
  Replica& replica = it->second;
  replica.asking = false;
  // A stream that broke meanwhile has it asked at once, once more.
  if (replica.failures > 0 && asked < replica.failed) return;
  replica.failure = status;
  replica.failed = now;
  absl::Duration backoff = options_.initial_backoff;
  for (int i = 0; i < replica.failures && backoff < options_.max_backoff; ++i) backoff *= 2;
  ++replica.failures;
  replica.ask_again = now + std::min(backoff, options_.max_backoff);
}

void ReplicaTable::Suspect(const std::string& address, const absl::Status& status,
                           absl::Duration now) {
  const auto it = replicas_.find(address);
  if (it == replicas_.end()) return;
  Replica& replica = it->second;
  if (replica.failures > 0) return;  // it is not used, and is asked in its time
  replica.failures = 1;
  replica.failure = status;
  replica.failed = now;
  replica.ask_again = now;
}

void ReplicaTable::SetFull(const std::string& address, absl::Duration until) {
  const auto it = replicas_.find(address);
  if (it != replicas_.end()) it->second.full_until = until;
}

bool ReplicaTable::HasRoom(const Replica& replica, absl::Duration now) {
  const v1::GetLoadResponse& load = *replica.load;
  const bool is_full = load.max_sessions() > 0 && load.active_sessions() >= load.max_sessions();
  return !is_full && replica.full_until <= now;
}

double ReplicaTable::Share(const Entry& entry, bool holds) const {
  const auto& [address, replica] = entry;
  double own = 0;  // bytes of this client's that the answer does not know of
  for (const auto& [number, prompt] : prompts_) {
    if (prompt.address != address) continue;
    const bool is_in = prompt.opened.has_value() && *prompt.opened <= replica.asked;
    const bool has_ended = prompt.ended.has_value();
    if (!is_in && !has_ended) own += static_cast<double>(prompt.bytes);
    if (is_in && has_ended) own -= static_cast<double>(prompt.bytes);
  }
  const v1::GetLoadResponse& load = *replica.load;
  const double share =
      ShareOf(static_cast<double>(load.reserved_bytes()) + own, load.limit_bytes());
  if (!holds) return share;
  return std::max(
      share, ShareOf(static_cast<double>(load.hold_reserved_bytes()), load.hold_limit_bytes()));
}

std::string ReplicaTable::LeastLoaded(const std::vector<const Entry*>& candidates, bool holds,
                                      absl::Duration now) {
  std::vector<std::pair<double, const std::string*>> shares;
  for (const bool full_too : {false, true}) {
    for (const Entry* entry : candidates) {
      if (!full_too && !HasRoom(entry->second, now)) continue;
      shares.emplace_back(Share(*entry, holds), &entry->first);
    }
    if (!shares.empty()) break;
  }
  std::sort(shares.begin(), shares.end());
  size_t count = 1;
  while (count < shares.size() && shares[count].first <= shares[0].first + kSameShare) ++count;
  return *shares[random_() % count].second;
}

bool ReplicaTable::IsAwaited(const Replica& replica, absl::Duration now, bool impatient) const {
  if (replica.failures > 0 || IsFresh(replica, now)) return false;
  return !(impatient && IsUsable(replica));
}

absl::StatusOr<std::optional<std::string>> ReplicaTable::Choose(const PlacementRequest& request,
                                                                absl::Duration now,
                                                                bool impatient) {
  if (!request.group.empty()) return ChooseForGroup(request, now, impatient);
  std::vector<const Entry*> candidates;
  bool awaited = false;
  for (const Entry& entry : replicas_) {
    const Replica& replica = entry.second;
    if (request.tried.contains(entry.first)) continue;
    // One that was never heard of is not waited for where others are.
    const bool unheard = impatient && !replica.load.has_value();
    if (IsAwaited(replica, now, impatient) && !unheard) {
      awaited = true;
    } else if (IsUsable(replica)) {
      candidates.push_back(&entry);
    }
  }
  if (awaited) return std::optional<std::string>();
  if (candidates.empty()) return None(request);
  return std::optional<std::string>(LeastLoaded(candidates, request.holds, now));
}

absl::StatusOr<std::optional<std::string>> ReplicaTable::ChooseForGroup(
    const PlacementRequest& request, absl::Duration now, bool impatient) {
  std::vector<std::pair<uint64_t, const Entry*>> order;
  for (const Entry& entry : replicas_) {
    if (request.tried.contains(entry.first)) continue;
    order.emplace_back(Weight(request.group, entry.first), &entry);
  }
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return b < a; });
  for (const auto& [weight, entry] : order) {
    const Replica& replica = entry->second;
    // Of one that has only just failed the answer decides, since other ranks may find it well.
    const bool doubtful = replica.failures == 1 && (replica.asking || now >= replica.ask_again);
    if (doubtful || IsAwaited(replica, now, impatient)) return std::optional<std::string>();
    if (IsUsable(replica)) return std::optional<std::string>(entry->first);
  }
  return None(request);
}

absl::StatusOr<std::optional<std::string>> ReplicaTable::None(
    const PlacementRequest& request) const {
  std::vector<std::string> reasons;
  std::set<absl::StatusCode> codes;
  for (const auto& [address, replica] : replicas_) {
    if (request.tried.contains(address)) continue;
    if (replica.asking && !IsUsable(replica)) {
      // A draining one that is asked again will go on draining.
      if (replica.failures > 0 || !replica.load.has_value()) return std::optional<std::string>();
    }
    const bool failed = replica.failures > 0;
    codes.insert(failed ? replica.failure.code() : absl::StatusCode::kUnavailable);
    reasons.push_back(absl::StrCat(
        address, ": ", failed ? replica.failure.message() : absl::string_view("it is draining")));
  }
  // All of one mind: for instance none may be sent the token in plain text.
  const absl::StatusCode code = codes.size() == 1 ? *codes.begin() : absl::StatusCode::kUnavailable;
  return absl::Status(
      code, absl::StrCat("no replica can take the prompt: ",
                         reasons.empty() ? "there is no other one" : absl::StrJoin(reasons, "; ")));
}

uint64_t ReplicaTable::Begin(const std::string& address, uint64_t bytes) {
  const uint64_t number = next_prompt_++;
  prompts_[number] = {address, bytes, std::nullopt, std::nullopt};
  return number;
}

void ReplicaTable::Open(uint64_t prompt, uint64_t bytes, absl::Duration now) {
  const auto it = prompts_.find(prompt);
  if (it == prompts_.end() || it->second.ended.has_value()) return;
  it->second.bytes = bytes;
  it->second.opened = now;
}

void ReplicaTable::End(uint64_t prompt, absl::Duration now) {
  const auto it = prompts_.find(prompt);
  if (it == prompts_.end() || it->second.ended.has_value()) return;
  const auto replica = replicas_.find(it->second.address);
  const bool is_in = replica != replicas_.end() && it->second.opened.has_value() &&
                     *it->second.opened <= replica->second.asked;
  // What no answer has counted is gone; the rest until one has not.
  if (is_in) {
    it->second.ended = now;
  } else {
    prompts_.erase(it);
  }
}

std::vector<ReplicaState> ReplicaTable::Report() const {
  std::vector<ReplicaState> states;
  for (const auto& [address, replica] : replicas_) {
    ReplicaState& state = states.emplace_back();
    state.address = address;
    if (replica.failures > 0) {
      state.health = ReplicaState::Health::kFailed;
      state.failure = replica.failure;
    } else if (replica.load.has_value()) {
      state.health =
          replica.load->draining() ? ReplicaState::Health::kDraining : ReplicaState::Health::kReady;
    }
    if (!replica.load.has_value()) continue;
    state.reserved_bytes = replica.load->reserved_bytes();
    state.limit_bytes = replica.load->limit_bytes();
    state.active_sessions = replica.load->active_sessions();
  }
  return states;
}

}  // namespace structkv::client::internal
