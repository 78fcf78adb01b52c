#include "service/session/shard_group.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "service/session/session_plan.h"
#include "service/session/shard_groups.h"

namespace structkv::session {
namespace {

template <typename... Args>
absl::Status Invalid(const Args&... text) {
  return absl::InvalidArgumentError(absl::StrCat(text...));
}

// The first field in which two ranks disagree. Both are sorted by field; a field that one does not
// have is unset there.
absl::Status CheckAgreement(const SessionRequest& first, const SessionRequest& other,
                            absl::string_view group) {
  const auto disagree = [&](const std::string& field, absl::string_view value,
                            absl::string_view firsts) {
    return Invalid(field, " is ", value, " of shard ", other.shard->shard_index, " and ", firsts,
                   " of shard ", first.shard->shard_index, " of the group ", group,
                   "; they must agree");
  };
  constexpr absl::string_view kUnset = "unset";
  auto a = first.agreed.begin();
  auto b = other.agreed.begin();
  while (a != first.agreed.end() || b != other.agreed.end()) {
    if (b == other.agreed.end() || (a != first.agreed.end() && a->first < b->first)) {
      return disagree(a->first, kUnset, a->second);
    }
    if (a == first.agreed.end() || b->first < a->first)
      return disagree(b->first, b->second, kUnset);
    if (a->second != b->second) return disagree(a->first, b->second, a->second);
    ++a;
    ++b;
  }
  return absl::OkStatus();
}

}  // namespace

ShardGroup::ShardGroup(const SessionRequest& first, const SessionHost& host)
    : first_(first),
      host_(host),
      small_(SizeOfLayers(first.spec, *host.backend) == LayerSize::kSmall),
      lane_(host.scheduler->NewLane()),
      members_(static_cast<size_t>(first.shard->shard_count)),
      room_(members_.size(), false),
      done_(members_.size(), false) {}

ShardGroup::~ShardGroup() { host_.groups->Remove(ShardGroups::KeyOf(first_), this); }

std::string ShardGroup::Name() const { return absl::StrCat("'", first_.shard->group_id, "'"); }

void ShardGroup::Enqueue(absl::AnyInvocable<void()> event) {
  const std::shared_ptr<ShardGroup> self = shared_from_this();
  queue_.Run(std::move(event));
}

// Joining

absl::Status ShardGroup::CheckLocked(const SessionRequest& request) const {
  const engine::ShardMember& shard = *request.shard;
  absl::Status agreed = CheckAgreement(first_, request, Name());
  if (!agreed.ok()) return agreed;
  if (shard.shard_count != size()) {
    return Invalid("open.shard_group.shard_count is ", shard.shard_count, " and ", size(),
                   " of shard ", first_.shard->shard_index, " of the group ", Name());
  }
  for (const Member& member : members_) {
    if (member.core == nullptr) continue;
    if (member.shard.shard_index == shard.shard_index) {
      return Invalid("open.shard_group.shard_index is ", shard.shard_index,
                     ", which has joined the group ", Name(), " already");
    }
    absl::Status apart = engine::CheckApart(member.shard, shard);
    if (!apart.ok()) return apart;
  }
  return absl::OkStatus();
}

absl::Status ShardGroup::Check(const SessionRequest& request) {
  absl::Status status;
  {
    const std::lock_guard lock(mutex_);
    if (phase_ == Phase::kOver) return absl::OkStatus();  // Join() will say so
    status = CheckLocked(request);
    if (status.ok() || phase_ != Phase::kWaiting) return status;
  }
  EndWait(status);
  return status;
}

absl::StatusOr<bool> ShardGroup::Join(const SessionRequest& request,
                                      std::shared_ptr<SessionCore> core) {
  absl::Status status;
  {
    const std::lock_guard lock(mutex_);
    if (phase_ == Phase::kOver) return false;
    status = CheckLocked(request);
    if (!status.ok() && phase_ != Phase::kWaiting) return status;
    if (status.ok()) {
      Member& own = members_[static_cast<size_t>(request.shard->shard_index)];
      own = {.core = std::move(core), .shard = *request.shard};
      std::vector<engine::ShardMember> joined;
      for (const Member& member : members_) {
        if (member.core != nullptr) joined.push_back(member.shard);
      }
      if (static_cast<int64_t>(joined.size()) < size()) return true;
      status = engine::CheckComplete(joined, spec().geometry);
      if (status.ok()) {
        phase_ = Phase::kRunning;
      } else {
        own.core = nullptr;  // its opening says so
      }
    }
  }
  if (!status.ok()) {
    EndWait(status);
    return status;
  }
  Enqueue([this] { Begin(); });
  return true;
}

bool ShardGroup::Release(const SessionCore* core) {
  std::shared_ptr<SessionCore> released;
  int64_t index = 0;
  {
    const std::lock_guard lock(mutex_);
    if (phase_ != Phase::kWaiting) return false;
    for (Member& member : members_) {
      if (member.core.get() != core) continue;
      index = member.shard.shard_index;
      released = std::move(member.core);
    }
  }
  if (released == nullptr) return false;
  Enqueue([this, index, released = std::move(released)] {
    for (auto& [layer, parts] : parts_) parts.erase(index);
    room_[static_cast<size_t>(index)] = false;
    released->GroupIsOver();
  });
  return true;
}

void ShardGroup::CheckWait(absl::Duration limit) {
  std::vector<size_t> missing;
  {
    const std::lock_guard lock(mutex_);
    if (phase_ == Phase::kOver) return;
    for (size_t i = 0; i < members_.size(); ++i) {
      if (members_[i].core == nullptr) missing.push_back(i);
    }
  }
  if (missing.empty()) {
    Enqueue([this, limit] { CheckStandstill(limit); });
    return;
  }
  if (absl::FromChrono(Clock::now() - made_) < limit) return;
  EndWait(absl::DeadlineExceededError(
      absl::StrCat("the group ", Name(), " waited longer than the limit of ",
                   absl::FormatDuration(limit), " for shard", missing.size() == 1 ? " " : "s ",
                   absl::StrJoin(missing, ", "), " of ", size())));
}

void ShardGroup::EndWait(const absl::Status& status) {
  Enqueue([this, status] { End(Phase::kWaiting, nullptr, status, status); });
}

// What the members say

void ShardGroup::Offer(int64_t shard_index, engine::LayerInput part) {
  Enqueue([this, shard_index, part = std::move(part)]() mutable {
    {
      const std::lock_guard lock(mutex_);
      if (phase_ == Phase::kOver) return;
    }
    still_since_.reset();
    const int64_t layer = part.layer;
    Parts& parts = parts_[layer];
    parts.insert_or_assign(shard_index, std::move(part));
    if (static_cast<int64_t>(parts.size()) < size()) return;
    ready_.push_back(layer);
    Advance();
  });
}

void ShardGroup::HasRoom(int64_t shard_index) {
  Enqueue([this, shard_index] {
    room_[static_cast<size_t>(shard_index)] = true;
    Advance();
  });
}

void ShardGroup::Done(int64_t shard_index) {
  Enqueue([this, shard_index] {
    done_[static_cast<size_t>(shard_index)] = true;
    if (std::find(done_.begin(), done_.end(), false) == done_.end()) Finish();
  });
}

void ShardGroup::Left(const SessionCore* core, const absl::Status& status) {
  Enqueue([this, core, status] {
    int64_t index = -1;
    {
      const std::lock_guard lock(mutex_);
      for (const Member& member : members_) {
        if (member.core.get() == core) index = member.shard.shard_index;
      }
      if (index < 0) return;
    }
    End(Phase::kRunning, core, status,
        absl::AbortedError(absl::StrCat("shard ", index, " of the group ", Name(),
                                        " ended: ", absl::StatusCodeToString(status.code()), ": ",
                                        status.message())));
  });
}

// Whether every rank waits for its answer and no layer has come from all of them. A rank that owes
// a message is its silence limit's, one that takes no results its stall limit's, one with a
// transfer under way its transport's.
bool ShardGroup::StandsStill() {
  if (!begun_ || computing_ || parts_.empty() || !ready_.empty()) return false;
  if (std::find(room_.begin(), room_.end(), false) != room_.end()) return false;
  const std::lock_guard lock(mutex_);
  return phase_ == Phase::kRunning &&
         std::all_of(members_.begin(), members_.end(), [](const Member& member) {
           return member.core->turn() == Turn::kServers && !member.core->transfers();
         });
}

void ShardGroup::CheckStandstill(absl::Duration limit) {
  if (!StandsStill()) {
    still_since_.reset();
    return;
  }
  const Clock::time_point now = Clock::now();
  if (!still_since_.has_value()) still_since_ = now;
  if (absl::FromChrono(now - *still_since_) < limit) return;
  std::vector<std::string> lacking;
  for (const auto& [layer, parts] : parts_) {
    int64_t shard = 0;
    while (parts.count(shard) > 0) ++shard;
    lacking.push_back(absl::StrCat("layer ", layer, " lacks shard ", shard));
  }
  const absl::Status status = absl::DeadlineExceededError(absl::StrCat(
      "the ranks of the group ", Name(), " waited for one another longer than the limit of ",
      absl::FormatDuration(limit), ": ", absl::StrJoin(lacking, ", ")));
  End(Phase::kRunning, nullptr, status, status);
}

// Layers

void ShardGroup::Begin() {
  std::vector<engine::Shard> shards;
  {
    const std::lock_guard lock(mutex_);
    if (phase_ != Phase::kRunning) return;
    for (const Member& member : members_) shards.push_back(member.shard.heads);
    // Who waits for a GPU's event must not hold up the thread that reads streams.
    here_ = small_ && std::all_of(members_.begin(), members_.end(), [](const Member& member) {
              return member.core->host_readable();
            });
  }
  begun_ = true;
  prompt_.emplace(spec(), host_.backend, host_.buffers, std::move(shards));
  Advance();
}

void ShardGroup::Advance() {
  if (!begun_ || computing_ || ready_.empty()) return;
  if (std::find(room_.begin(), room_.end(), false) != room_.end()) return;
  const auto found = parts_.find(ready_.front());
  ready_.pop_front();
  std::vector<engine::LayerInput> inputs;
  for (auto& [index, part] : found->second) inputs.push_back(std::move(part));
  parts_.erase(found);
  {
    const std::lock_guard lock(next_mutex_);
    next_ = std::move(inputs);
  }
  room_.assign(room_.size(), false);
  computing_ = true;
  engine::Scheduler::Job job = [self = shared_from_this(), posted = Clock::now()](
                                   ParallelFor parallel) { self->Compute(posted, parallel); };
  if (here_ && host_.scheduler->TryRunHere(lane_, small_, job)) return;
  host_.scheduler->Post(lane_, small_, std::move(job));
}

void ShardGroup::Compute(Clock::time_point posted, ParallelFor parallel) {
  std::optional<std::vector<engine::LayerInput>> inputs;
  {
    const std::lock_guard lock(next_mutex_);
    inputs.swap(next_);
  }
  if (!inputs.has_value()) return;  // the group ended
  const Clock::time_point begin = Clock::now();
  const int64_t layer = inputs->front().layer;
  Computed computed = {.outputs = absl::InternalError("a layer was not computed")};
  const absl::Status ready = AwaitInputs(&computed.culprit);
  if (ready.ok()) {
    computed.outputs = prompt_->CompressShards(*std::move(inputs), parallel, &computed.culprit);
  } else {
    computed.outputs = ready;
  }
  inputs.reset();
  if (computed.outputs.ok()) computed.pivot = prompt_->TakePivot();
  if (computed.pivot.has_value()) computed.skeleton = prompt_->skeleton();
  computed.timing = {.layer = layer,
                     .status = computed.outputs.status(),
                     .begun = begin,
                     .queued = absl::FromChrono(begin - posted),
                     .computed = absl::FromChrono(Clock::now() - begin),
                     .stages = prompt_->stages()};
  Enqueue([this, computed = std::move(computed)]() mutable { OnComputed(std::move(computed)); });
}

absl::Status ShardGroup::AwaitInputs(int64_t* culprit) {
  std::vector<std::shared_ptr<SessionCore>> ranks;
  {
    const std::lock_guard lock(mutex_);
    for (const Member& member : members_) ranks.push_back(member.core);
  }
  for (size_t i = 0; i < ranks.size(); ++i) {
    absl::Status ready = ranks[i]->AwaitInput();
    if (ready.ok()) continue;
    *culprit = static_cast<int64_t>(i);
    return ready;
  }
  return absl::OkStatus();
}

void ShardGroup::OnComputed(Computed computed) {
  computing_ = false;
  bool over = false;
  std::vector<std::shared_ptr<SessionCore>> cores;
  {
    const std::lock_guard lock(mutex_);
    over = phase_ == Phase::kOver;
    for (const Member& member : members_) cores.push_back(member.core);
  }
  if (over) {
    computed = {.outputs = absl::CancelledError()};  // its buffers go before the reservations
    GiveBack();
    return;
  }
  if (!computed.outputs.ok()) {
    const absl::Status& status = computed.outputs.status();
    cores.front()->TellGroupFailure(computed.timing);
    if (computed.culprit < 0) {
      End(Phase::kRunning, nullptr, status, status);
    } else {
      Left(cores[static_cast<size_t>(computed.culprit)].get(), status);
    }
    return;
  }
  for (size_t i = 0; i < cores.size(); ++i) {
    cores[i]->TakeGroupAnswer({.output = std::move((*computed.outputs)[i]),
                               .pivot = computed.pivot,
                               .skeleton = computed.skeleton,
                               .timing = computed.timing});
  }
}

// The end

void ShardGroup::Finish() {
  {
    const std::lock_guard lock(mutex_);
    if (phase_ != Phase::kRunning) return;
    phase_ = Phase::kOver;
  }
  host_.groups->Remove(ShardGroups::KeyOf(first_), this);
  if (const std::optional<int64_t> pivot = prompt_->ExactPivot()) {
    host_.pivot_profile->Record(spec(), *pivot);
  }
  prompt_.reset();
  for (const std::shared_ptr<SessionCore>& core : TakeCores()) core->GroupHasFinished();
}

void ShardGroup::End(Phase from, const SessionCore* culprit, const absl::Status& own,
                     const absl::Status& others) {
  std::vector<std::shared_ptr<SessionCore>> cores;
  {
    const std::lock_guard lock(mutex_);
    if (phase_ > from) return;
    phase_ = Phase::kOver;
    for (const Member& member : members_) {
      if (member.core != nullptr) cores.push_back(member.core);
    }
  }
  host_.groups->Remove(ShardGroups::KeyOf(first_), this);
  parts_.clear();
  ready_.clear();
  std::optional<std::vector<engine::LayerInput>> waiting;
  {
    const std::lock_guard lock(next_mutex_);
    waiting.swap(next_);
  }
  if (waiting.has_value()) computing_ = false;  // its turn will find nothing to do
  waiting.reset();
  for (const std::shared_ptr<SessionCore>& core : cores) {
    core->Fail(core.get() == culprit ? own : others);
  }
  if (!computing_) GiveBack();
}

void ShardGroup::GiveBack() {
  prompt_.reset();
  for (const std::shared_ptr<SessionCore>& core : TakeCores()) core->GroupIsOver();
}

std::vector<std::shared_ptr<SessionCore>> ShardGroup::TakeCores() {
  std::vector<std::shared_ptr<SessionCore>> cores;
  const std::lock_guard lock(mutex_);
  for (Member& member : members_) {
    if (member.core != nullptr) cores.push_back(std::move(member.core));
    member.core = nullptr;
  }
  return cores;
}

}  // namespace structkv::session
