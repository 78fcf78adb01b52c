#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <random>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "service/live.h"
#include "service/session/limit.h"
#include "service/session/session.h"
#include "service/session/session_core.h"
#include "service/session/session_impl.h"
#include "service/session/session_plan.h"
#include "service/session/session_registry.h"
#include "service/session/shard_groups.h"

namespace structkv::session {
namespace {

// How long an opening waits for the memory of the session that it replaces: long enough for a large
// layer that is being computed.
constexpr absl::Duration kReplaceLimit = absl::Seconds(2);

// 128 random bits, so that an id cannot be guessed.
std::string NewId() {
  std::random_device random;
  std::array<uint32_t, 4> words;
  for (uint32_t& word : words) word = random();
  return absl::StrFormat("%08x%08x%08x%08x", words[0], words[1], words[2], words[3]);
}

// What a prompt, or a rank of one, takes of the budget of held caches.
absl::StatusOr<int64_t> BytesToHold(const SessionRequest& request) {
  if (!request.hold.has_value()) return 0;
  return HeldBytes(OwnSpec(request));
}

transport::PromptSizes SizesOf(const SessionRequest& request) {
  const engine::PromptSpec own = OwnSpec(request);
  return {.layers = own.geometry.layers,
          .layers_in_flight = request.layers_in_flight,
          .input_key_bytes = own.InputBytes(engine::InputTensor::kKeys),
          .input_value_bytes = own.InputBytes(engine::InputTensor::kValues),
          .key_bytes = own.KeptBytes(engine::InputTensor::kKeys),
          .value_bytes = own.KeptBytes(engine::InputTensor::kValues),
          .pulled = own.pull != engine::Pull::kNone,
          .held = request.hold.has_value()};
}

int Threads(int wanted) {
  if (wanted > 0) return wanted;
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

SessionLimits LimitsOf(const SessionManagerOptions& options) {
  return {.prompt = options.limits,
          .max_sessions = options.max_sessions,
          .tenants = options.tenants,
          .hold_lease = options.hold.default_lease,
          .max_hold_lease = options.hold.max_lease};
}

class SessionManager::Impl {
 public:
  Impl(const SessionManagerOptions& options_in, std::unique_ptr<Backend> backend_in)
      : options(options_in),
        backend(std::move(backend_in)),
        pivot_profile(options.pivot_profile),
        budget(options.memory_budget_bytes),
        buffers(static_cast<size_t>(std::max<int64_t>(options.idle_buffer_bytes, 0)),
                backend->host_pinning()),
        held_caches(options.hold, options.clock),
        tenants(options.tenants),
        limits(LimitsOf(options)),
        scheduler(Threads(options.threads)) {
    // Nothing can fail without a file.
    if (pivot_profile == nullptr) pivot_profile = *PivotProfile::Open({});
  }

  // Memory of the budget, and of the tenant's share.
  absl::StatusOr<Reservation> Reserve(const std::string& tenant,
                                      const TenantShares::Amounts& amounts) {
    absl::StatusOr<TenantShares::Share> share = tenants.Take(tenant, amounts);
    if (!share.ok()) return share.status();
    absl::StatusOr<Reservation> reservation = budget.Reserve(amounts.memory_bytes);
    if (!reservation.ok()) return MarkLimit(reservation.status(), kMemoryBudgetLimit);
    reservation->Keep(*std::move(share));
    return reservation;
  }

  // Reserves memory for what a session is to hold.
  absl::StatusOr<Holding> Hold(const SessionRequest& request) {
    Holding holding;
    if (!request.hold.has_value()) return holding;
    absl::StatusOr<absl::Duration> lease =
        held_caches.Lease(request.hold->lease_millis, "open.hold.lease_millis");
    if (!lease.ok()) return lease.status();
    const absl::StatusOr<int64_t> bytes = BytesToHold(request);
    if (!bytes.ok()) return bytes.status();
    const auto take = [&] { return tenants.Take(request.hold->tenant, {.hold_bytes = *bytes}); };
    absl::StatusOr<TenantShares::Share> share = take();
    if (!share.ok()) {
      held_caches.DropExpired();  // of the tenant's, perhaps
      share = take();
    }
    if (!share.ok()) return share.status();
    absl::StatusOr<Reservation> reservation = held_caches.Reserve(*bytes);
    if (!reservation.ok()) return reservation.status();
    reservation->Keep(*std::move(share));
    holding.cache = std::make_unique<HeldCache>();
    holding.cache->spec = request.spec;
    holding.cache->kv_heads = request.shard.has_value()
                                  ? request.shard->heads.kv_heads
                                  : engine::HeadRange{0, request.spec.geometry.kv_heads};
    holding.cache->reservation = *std::move(reservation);
    holding.cache->allowance = buffers.Allow(static_cast<size_t>(*bytes));
    holding.cache->layers.resize(static_cast<size_t>(request.spec.geometry.layers));
    holding.tenant = request.hold->tenant;
    holding.lease = *lease;
    return holding;
  }

  // Ends the session that holds `key`, and waits for its memory. False where there is none.
  bool Replace(const std::string& key, absl::Duration limit) {
    const std::shared_ptr<SessionCore> old = registry->FindKey(key);
    if (old == nullptr) return false;
    old->Fail(
        absl::AbortedError("a new stream with the same idempotency_key took this one's place"),
        /*replaced=*/true);
    registry->WaitRemoved(old->id(), limit);
    registry->ForgetKey(old->id());
    return true;
  }

  const SessionManagerOptions options;
  const std::unique_ptr<Backend> backend;
  std::shared_ptr<PivotProfile> pivot_profile;
  MemoryBudget budget;
  engine::BufferPool buffers;
  HeldCaches held_caches;
  TenantShares tenants;
  Live<SessionLimits> limits;
  const std::shared_ptr<SessionRegistry> registry = std::make_shared<SessionRegistry>();
  const std::shared_ptr<ShardGroups> groups = std::make_shared<ShardGroups>();
  engine::Scheduler scheduler;  // last: its threads use all of the above
};

SessionManager::SessionManager(const SessionManagerOptions& options,
                               std::unique_ptr<Backend> backend)
    : impl_(std::make_shared<Impl>(options, std::move(backend))) {}

SessionManager::~SessionManager() {
  StartDraining();
  FailAll(absl::UnavailableError("the server is gone"));
}

absl::StatusOr<std::shared_ptr<Session>> SessionManager::Open(const SessionRequest& wanted) {
  const absl::Status draining = absl::UnavailableError("the server is draining");
  if (absl::Status health = impl_->backend->Health(); !health.ok()) return health;
  if (this->draining()) return draining;
  const SessionManagerOptions& options = impl_->options;
  const SessionLimits limits = impl_->limits.Get();
  absl::Status valid =
      engine::ValidateSpec(wanted.spec, limits.prompt, impl_->backend->capabilities());
  if (!valid.ok()) return valid;
  if (wanted.shard.has_value()) {
    valid = engine::ValidateShard(*wanted.shard, wanted.spec.geometry);
    if (!valid.ok()) return valid;
  }
  if (wanted.hold.has_value()) {
    if (valid = impl_->held_caches.CheckEnabled(); !valid.ok()) return valid;
    valid = impl_->held_caches.Lease(wanted.hold->lease_millis, "open.hold.lease_millis").status();
    if (!valid.ok()) return valid;
    if (wanted.transport.results.has_value()) {
      return absl::InvalidArgumentError(
          "open.result_range is set; what is held stays in the server's own memory");
    }
  }
  SessionRequest request = wanted;
  impl_->pivot_profile->Resolve(&request.spec);
  absl::StatusOr<transport::Granted> granted =
      transport::Negotiate(request.transport, SizesOf(request), options.transports);
  if (!granted.ok()) return granted.status();
  absl::StatusOr<SessionPlan> plan = PlanSession(request, *impl_->backend, *granted->transport);
  if (!plan.ok()) return plan.status();
  // A prompt that can never fit must not end the one that it would replace.
  if (plan->reserved_bytes > options.memory_budget_bytes) {
    return MarkLimit(impl_->budget.Reserve(plan->reserved_bytes).status(), kMemoryBudgetLimit);
  }
  const std::string& tenant = request.transport.tenant;
  const auto exceeds = [](int64_t bytes, int64_t share) { return share > 0 && bytes > share; };
  if (exceeds(plan->reserved_bytes, limits.tenants.memory_bytes)) {
    return impl_->tenants.Take(tenant, {.memory_bytes = plan->reserved_bytes}).status();
  }
  const absl::StatusOr<int64_t> held_bytes = BytesToHold(request);
  if (!held_bytes.ok()) return held_bytes.status();
  if (*held_bytes > options.hold.budget_bytes) {
    return impl_->held_caches.Reserve(*held_bytes).status();
  }
  if (exceeds(*held_bytes, limits.tenants.hold_bytes)) {
    return impl_->tenants.Take(request.hold->tenant, {.hold_bytes = *held_bytes}).status();
  }
  // A key is one tenant's own.
  const std::string key = request.idempotency_key.empty()
                              ? ""
                              : absl::StrCat(tenant.size(), " ", tenant, request.idempotency_key);
  const auto begin = std::chrono::steady_clock::now();
  const auto left = [begin] {
    return kReplaceLimit - absl::FromChrono(std::chrono::steady_clock::now() - begin);
  };
  bool replaces = false;
  while (true) {
    if (!key.empty()) replaces |= impl_->Replace(key, left());
    const SessionHost host = {.backend = impl_->backend.get(),
                              .buffers = &impl_->buffers,
                              .scheduler = &impl_->scheduler,
                              .registry = impl_->registry,
                              .pivot_profile = impl_->pivot_profile.get(),
                              .groups = impl_->groups,
                              .held_caches = &impl_->held_caches};
    std::shared_ptr<ShardGroup> group;
    if (request.shard.has_value()) {
      absl::StatusOr<std::shared_ptr<ShardGroup>> found = impl_->groups->Find(request, host);
      if (!found.ok()) return found.status();
      group = *std::move(found);
      request.spec = group->spec();  // a profile may know more now than when the group was made
      plan = PlanSession(request, *impl_->backend, *granted->transport);
      if (!plan.ok()) return plan.status();
    }
    absl::StatusOr<Reservation> reservation =
        impl_->Reserve(tenant, {.sessions = 1, .memory_bytes = plan->reserved_bytes});
    if (!reservation.ok()) return reservation.status();
    absl::Status taken = granted->transport->Reserve();
    // What the other session has on its way keeps its memory until that is over.
    while (absl::IsResourceExhausted(taken) && replaces && left() > absl::ZeroDuration()) {
      absl::SleepFor(absl::Milliseconds(5));
      taken = granted->transport->Reserve();
    }
    if (!taken.ok()) return taken;
    absl::StatusOr<Holding> holding = impl_->Hold(request);
    if (!holding.ok()) return holding.status();
    auto core =
        std::make_shared<SessionCore>(NewId(), request, *plan, *granted, *std::move(reservation),
                                      host, group, *std::move(holding));
    switch (impl_->registry->Add(core->id(), key, core, limits.max_sessions)) {
      case SessionRegistry::Added::kYes: {
        if (group != nullptr) {
          const absl::StatusOr<bool> joined = group->Join(request, core);
          if (!joined.ok()) return joined.status();
          if (!*joined) break;  // it ended meanwhile: find another
        }
        auto handle = std::make_unique<Session::Impl>();
        handle->core = std::move(core);
        return std::shared_ptr<Session>(new Session(std::move(handle)));
      }
      case SessionRegistry::Added::kFull:
        return MarkLimit(
            absl::ResourceExhaustedError(absl::StrCat("max_sessions is ", limits.max_sessions,
                                                      ", and as many sessions run")),
            kMaxSessionsLimit);
      case SessionRegistry::Added::kDraining:
        return draining;
      case SessionRegistry::Added::kKeyTaken:
        break;  // another opening with this key was quicker: replace that one
    }
  }
}

void SessionManager::StartDraining() {
  impl_->registry->StartDraining();
  impl_->groups->EndWaiting(absl::UnavailableError("the server is draining"));
}
bool SessionManager::draining() const { return impl_->registry->draining(); }
bool SessionManager::WaitUntilEmpty(absl::Duration limit) {
  return impl_->registry->WaitEmpty(limit);
}

void SessionManager::FailAll(const absl::Status& status) {
  for (const std::shared_ptr<SessionCore>& core : impl_->registry->All()) core->Fail(status);
}

int64_t SessionManager::active_sessions() const { return impl_->registry->size(); }
HeldCaches& SessionManager::held_caches() { return impl_->held_caches; }
const HeldCaches& SessionManager::held_caches() const { return impl_->held_caches; }
absl::StatusOr<Reservation> SessionManager::Reserve(const std::string& tenant, int64_t bytes) {
  return impl_->Reserve(tenant, {.memory_bytes = bytes});
}
const MemoryBudget& SessionManager::budget() const { return impl_->budget; }
engine::BufferPool& SessionManager::buffers() { return impl_->buffers; }
const engine::BufferPool& SessionManager::buffers() const { return impl_->buffers; }
const Backend& SessionManager::backend() const { return *impl_->backend; }
engine::Scheduler& SessionManager::scheduler() { return impl_->scheduler; }
const SessionManagerOptions& SessionManager::options() const { return impl_->options; }
SessionLimits SessionManager::limits() const { return impl_->limits.Get(); }
void SessionManager::SetLimits(const SessionLimits& limits) {
  impl_->tenants.SetLimits(limits.tenants);
  impl_->held_caches.SetLeases(limits.hold_lease, limits.max_hold_lease);
  impl_->limits.Set(limits);
}
int SessionManager::threads() const { return impl_->scheduler.threads(); }
int64_t SessionManager::queue_depth() const { return impl_->scheduler.queue_depth(); }

}  // namespace structkv::session
