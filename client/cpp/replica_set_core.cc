#include "client/cpp/replica_set_core.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/credentials.h"
#include "client/cpp/retry.h"
#include "grpc/grpc.h"
#include "grpcpp/client_context.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/support/channel_arguments.h"
#include "structkv/v1/compression.grpc.pb.h"

namespace structkv::client::internal {
namespace {

// How long replicas that were well a moment ago are waited for where others have answered.
constexpr absl::Duration kPatience = absl::Milliseconds(100);
// How often names are looked up anew after failures, at most.
constexpr absl::Duration kResolveAgain = absl::Seconds(1);
// To a replica of several: how soon silence is noticed, and a connection tried again.
constexpr absl::Duration kKeepalive = absl::Seconds(10);
constexpr int kKeepaliveTimeoutMillis = 5000;
// Channels that are kept of addresses that a call has named, and that are none of the target's.
constexpr size_t kIdleReplicas = 64;
constexpr int kFirstReconnectMillis = 100;
constexpr int kReconnectMillis = 2000;

absl::Duration SteadyNow() {
  return absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
}

uint64_t Seed() {
  std::random_device random;
  return (uint64_t{random()} << 32) | random();
}

// `any`: what was found will do; otherwise a name that cannot be looked up now must not take its
// replicas away.
absl::StatusOr<std::vector<ReplicaAddress>> LookUpAll(const Target& target, bool any) {
  std::vector<ReplicaAddress> all;
  for (const std::string& address : target.fixed) all.push_back({address, ""});
  absl::Status failed;
  for (const std::string& name : target.names) {
    absl::StatusOr<std::vector<ReplicaAddress>> found = LookUp(name);
    failed.Update(found.status());
    if (found.ok()) all.insert(all.end(), found->begin(), found->end());
  }
  if (!failed.ok() && !(any && !all.empty())) return failed;
  return all;
}

// What a replica that did not say its load has failed with. Silence is no prompt's own deadline.
absl::Status LoadFailure(const absl::Status& status, absl::Duration limit) {
  if (absl::IsDeadlineExceeded(status)) {
    return absl::UnavailableError(
        absl::StrCat("it did not say its load within ", absl::FormatDuration(limit)));
  }
  if (absl::IsCancelled(status)) {
    return absl::UnavailableError(absl::StrCat("it did not say its load: ", status.message()));
  }
  return status;
}

}  // namespace

struct ReplicaSetCore::LoadCall {
  std::unique_ptr<v1::Compression::Stub> stub;
  grpc::ClientContext context;
  v1::GetLoadRequest request;
  v1::GetLoadResponse response;
  bool answered = false;  // the core's lock guards it
};

absl::StatusOr<std::shared_ptr<Replica>> MakeReplica(const std::string& address,
                                                     const std::string& name, bool several,
                                                     const ClientOptions& options) {
  auto credentials = CredentialsFor(address, options);
  if (!credentials.ok()) return credentials.status();
  grpc::ChannelArguments args;
  // Identity alone, in either direction.
  args.SetInt(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1);
  args.SetMaxReceiveMessageSize(-1);
  args.SetMaxSendMessageSize(-1);
  // gRPC's own retries would keep a copy of what is sent, and cannot know the protocol.
  args.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  // A connection of its own, not one shared with other clients of this process.
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  args.SetUserAgentPrefix(options.user_agent);
  absl::Duration keepalive = options.keepalive_interval;
  if (several) {
    keepalive = std::min(keepalive, kKeepalive);
    args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMillis);
    args.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kFirstReconnectMillis);
    args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, kReconnectMillis);
    args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kReconnectMillis);
  }
  if (keepalive != absl::InfiniteDuration()) {
    args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, static_cast<int>(absl::ToInt64Milliseconds(keepalive)));
  }
  if (!name.empty()) {
    args.SetSslTargetNameOverride(name);
    // A proxy, and exceptions from it, are of names; what is left of this one is its address.
    args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  }
  auto replica = std::make_shared<Replica>();
  replica->address = address;
  replica->name = name;
  replica->channel = grpc::CreateCustomChannel(address, *credentials, args);
  replica->transports = std::make_unique<TransportChooser>(replica->channel, options.own_process);
  return replica;
}

ReplicaSetCore::ReplicaSetCore(std::string text, Target target, const ClientOptions& options)
    : text_(std::move(text)),
      target_(std::move(target)),
      options_(options),
      table_(options.replicas, Seed()) {}

ReplicaSetCore::~ReplicaSetCore() {
  std::vector<std::shared_ptr<LoadCall>> calls;
  {
    absl::MutexLock lock(&mutex_);
    calls = calls_;
  }
  for (const std::shared_ptr<LoadCall>& call : calls) call->context.TryCancel();
  absl::MutexLock lock(&mutex_);
  while (
      !std::all_of(calls.begin(), calls.end(), [](const auto& call) { return call->answered; })) {
    changed_.Wait(&mutex_);
  }
}

void ReplicaSetCore::Resolve() {
  const auto& hook = options_.replicas.resolve;
  bool any = false;
  {
    absl::MutexLock lock(&mutex_);
    const absl::Duration age = SteadyNow() - resolved_;
    const bool is_fixed = hook == nullptr && target_.names.empty();
    absl::Duration due = options_.replicas.resolve_interval;
    if (resolve_soon_) due = std::min(due, kResolveAgain);
    if (table_.empty()) due = absl::ZeroDuration();
    if (is_fixed) due = absl::InfiniteDuration();
    if (resolving_ || age < due) return;
    resolving_ = true;
    resolve_soon_ = false;
    any = table_.empty();
  }
  if (hook != nullptr) {
    absl::StatusOr<std::vector<std::string>> given = hook();
    if (!given.ok()) return OnAddresses(given.status());
    std::vector<ReplicaAddress> addresses;
    for (std::string& address : *given) addresses.push_back({std::move(address), ""});
    return OnAddresses(addresses);
  }
  if (target_.names.empty()) return OnAddresses(LookUpAll(target_, any));
  // It may take the resolver's many seconds, and must not keep a prompt that has a replica.
  std::thread([self = shared_from_this(), any] {
    self->OnAddresses(LookUpAll(self->target_, any));
  }).detach();
}

void ReplicaSetCore::OnAddresses(const absl::StatusOr<std::vector<ReplicaAddress>>& found) {
  std::vector<std::shared_ptr<Replica>> dropped;
  absl::MutexLock lock(&mutex_);
  resolving_ = false;
  resolved_ = SteadyNow();
  resolve_status_ = found.status();
  if (found.ok() && found->empty()) {
    resolve_status_ = absl::UnavailableError("there is no address");
  }
  if (resolve_status_.ok()) {
    std::vector<std::string> addresses;
    names_.clear();
    // One that is listed is taken at its own name, though another one has it as well.
    for (const ReplicaAddress& each : *found) {
      addresses.push_back(each.address);
      names_.emplace(each.address, each.name);
    }
    table_.SetAddresses(addresses);
    // Channels go with the last of their streams.
    dropped = TakeIdle(0);
    for (const auto& [address, name] : names_) {
      const auto made = replicas_.find(address);
      if (made == replicas_.end() || made->second->name == name) continue;
      dropped.push_back(std::move(made->second));
      replicas_.erase(made);
    }
  }
  changed_.SignalAll();
}

absl::StatusOr<std::shared_ptr<Replica>> ReplicaSetCore::ReplicaAt(const std::string& address) {
  std::shared_ptr<Replica>& known = replicas_[address];
  if (known != nullptr) return known;
  auto made = MakeReplica(address, NameOf(address).value_or(""), /*several=*/true, options_);
  if (!made.ok()) {
    replicas_.erase(address);
    return made.status();
  }
  known = *std::move(made);
  return known;
}

std::optional<std::string> ReplicaSetCore::NameOf(const std::string& address) const {
  if (const auto known = names_.find(address); known != names_.end()) return known->second;
  const std::vector<std::string>& fixed = target_.fixed;
  const bool is_fixed = std::find(fixed.begin(), fixed.end(), address) != fixed.end();
  if (is_fixed || target_.names.empty() || !IsIpAddress(address)) return "";
  if (target_.names.size() == 1) return HostOf(target_.names.front());
  return std::nullopt;
}

std::vector<std::shared_ptr<Replica>> ReplicaSetCore::TakeIdle(size_t kept) {
  std::vector<std::string> idle;
  for (const auto& [address, replica] : replicas_) {
    if (!names_.contains(address) && replica.use_count() == 1) idle.push_back(address);
  }
  std::vector<std::shared_ptr<Replica>> taken;
  for (; idle.size() > kept; idle.pop_back()) {
    taken.push_back(std::move(replicas_[idle.back()]));
    replicas_.erase(idle.back());
  }
  return taken;
}

void ReplicaSetCore::Ask() {
  std::vector<std::string> due;
  std::vector<std::shared_ptr<LoadCall>> answered;  // which end without the lock
  {
    absl::MutexLock lock(&mutex_);
    const auto first = std::partition(calls_.begin(), calls_.end(),
                                      [](const auto& call) { return !call->answered; });
    answered.assign(std::make_move_iterator(first), std::make_move_iterator(calls_.end()));
    calls_.erase(first, calls_.end());
    due = table_.TakeDue(SteadyNow());
  }
  for (const std::string& address : due) AskOne(address);
}

void ReplicaSetCore::AskOne(const std::string& address) {
  const absl::Duration asked = SteadyNow();
  const auto call = std::make_shared<LoadCall>();
  const absl::StatusOr<std::shared_ptr<Replica>> replica = [&] {
    absl::MutexLock lock(&mutex_);
    absl::StatusOr<std::shared_ptr<Replica>> found = ReplicaAt(address);
    if (found.ok()) calls_.push_back(call);
    return found;
  }();
  if (!replica.ok()) return OnAnswer(address, asked, replica.status(), {}, nullptr);
  call->stub = v1::Compression::NewStub((*replica)->channel);
  call->context.set_deadline(absl::ToChronoTime(absl::Now() + options_.replicas.load_timeout));
  call->stub->async()->GetLoad(
      &call->context, &call->request, &call->response,
      [this, address, asked, call = call.get()](const grpc::Status& status) {
        OnAnswer(address, asked, StatusOfCall(status, call->context), call->response, call);
      });
}

void ReplicaSetCore::OnAnswer(const std::string& address, absl::Duration asked,
                              const absl::Status& status, const v1::GetLoadResponse& load,
                              LoadCall* call) {
  // An older server cannot say. One that does not know this client's channel, which GetLoad comes
  // by alone, may know what comes with a prompt, or refuses that.
  const bool untold = absl::IsUnimplemented(status) || absl::IsUnauthenticated(status) ||
                      absl::IsPermissionDenied(status);
  absl::MutexLock lock(&mutex_);
  if (status.ok() || untold) {
    table_.OnLoad(address, load, asked);
  } else {
    table_.OnFailure(address, LoadFailure(status, options_.replicas.load_timeout), asked,
                     SteadyNow());
    resolve_soon_ = true;
  }
  if (call != nullptr) call->answered = true;  // whoever waits for it may be about to end the core
  changed_.SignalAll();
}

absl::Status ReplicaSetCore::WaitForAddresses(absl::Time deadline) {
  Resolve();
  absl::MutexLock lock(&mutex_);
  while (table_.empty() && resolving_) {
    if (changed_.WaitWithDeadline(&mutex_, deadline)) {
      return absl::DeadlineExceededError(absl::StrCat(text_, " was not looked up in time"));
    }
  }
  if (!table_.empty()) return absl::OkStatus();
  return absl::Status(resolve_status_.code(), absl::StrCat(text_, ": ", resolve_status_.message()));
}

absl::StatusOr<std::shared_ptr<Replica>> ReplicaSetCore::Choose(const PlacementRequest& request,
                                                                absl::Time deadline) {
  if (absl::Status status = WaitForAddresses(deadline); !status.ok()) return status;
  const absl::Duration begin = SteadyNow();
  while (true) {
    Ask();
    absl::MutexLock lock(&mutex_);
    const absl::Duration now = SteadyNow();
    const bool impatient = now - begin >= kPatience;
    absl::StatusOr<std::optional<std::string>> chosen = table_.Choose(request, now, impatient);
    if (!chosen.ok()) {
      return absl::Status(chosen.status().code(),
                          absl::StrCat(text_, ": ", chosen.status().message()));
    }
    if (chosen->has_value()) return ReplicaAt(**chosen);
    if (absl::Now() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat(text_, ": no replica has answered in time"));
    }
    changed_.WaitWithDeadline(&mutex_, std::min(deadline, absl::Now() + kPatience));
  }
}

absl::StatusOr<std::shared_ptr<Replica>> ReplicaSetCore::At(const std::string& address,
                                                            absl::Time deadline) {
  const bool named = [&] {
    absl::MutexLock lock(&mutex_);
    return NameOf(address).has_value();
  }();
  // Whose address it is decides which certificate it must have. Without an answer it is its own.
  if (!named) WaitForAddresses(deadline).IgnoreError();
  std::vector<std::shared_ptr<Replica>> dropped;
  absl::MutexLock lock(&mutex_);
  absl::StatusOr<std::shared_ptr<Replica>> replica = ReplicaAt(address);
  dropped = TakeIdle(kIdleReplicas);
  return replica;
}

absl::StatusOr<std::vector<std::shared_ptr<Replica>>> ReplicaSetCore::All(absl::Time deadline) {
  if (absl::Status status = WaitForAddresses(deadline); !status.ok()) return status;
  absl::MutexLock lock(&mutex_);
  std::vector<ReplicaState> states = table_.Report();
  std::stable_sort(states.begin(), states.end(), [](const auto& a, const auto& b) {
    const auto is_failed = [](const ReplicaState& state) {
      return state.health == ReplicaState::Health::kFailed;
    };
    return is_failed(a) < is_failed(b);
  });
  std::vector<std::shared_ptr<Replica>> all;
  for (const ReplicaState& state : states) {
    auto replica = ReplicaAt(state.address);
    if (!replica.ok()) return replica.status();
    all.push_back(*std::move(replica));
  }
  return all;
}

std::vector<ReplicaState> ReplicaSetCore::Report() const {
  absl::MutexLock lock(&mutex_);
  return table_.Report();
}

uint64_t ReplicaSetCore::Begin(const std::string& address, uint64_t bytes) {
  absl::MutexLock lock(&mutex_);
  return table_.Begin(address, bytes);
}

void ReplicaSetCore::Open(uint64_t prompt, uint64_t bytes) {
  absl::MutexLock lock(&mutex_);
  table_.Open(prompt, bytes, SteadyNow());
}

void ReplicaSetCore::End(uint64_t prompt, const std::string& address, const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  const absl::Duration now = SteadyNow();
  table_.End(prompt, now);
  if (absl::IsUnavailable(status)) {
    table_.Suspect(address, status, now);
    resolve_soon_ = true;
  }
  if (absl::IsResourceExhausted(status)) {
    if (const auto wait = RetryAfter(status)) table_.SetFull(address, now + *wait);
  }
  changed_.SignalAll();
}

}  // namespace structkv::client::internal
