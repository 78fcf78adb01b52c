#include "service/transport/nccl/hub.h"

#include <algorithm>
#include <random>

#include "absl/strings/str_cat.h"

namespace structkv::nccl {
namespace {

Hub::PairId NewPairId() {
  std::random_device random;
  return (uint64_t{random()} << 32) | random();
}

absl::Status Silent(absl::string_view about, absl::Duration limit) {
  return absl::UnavailableError(absl::StrCat("the client was silent", about, " for longer than ",
                                             absl::FormatDuration(limit)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Hub>> Hub::Start(std::shared_ptr<const Api> api,
                                                const DeviceApi& device_api, HubOptions options) {
  if (options.worker.tick_interval * 2 > options.worker.silence_limit) {
    return absl::InvalidArgumentError(
        absl::StrCat("tick_interval is ", absl::FormatDuration(options.worker.tick_interval),
                     ", at most half of the silence_limit of ",
                     absl::FormatDuration(options.worker.silence_limit), " is allowed"));
  }
  absl::StatusOr<std::string> bus_id = device_api.bus_id(options.worker.device);
  if (!bus_id.ok()) return bus_id.status();
  std::unique_ptr<Hub> hub(new Hub(std::move(options)));
  hub->identity_ = {kProtocolVersion, api->version(), hub->options_.host_id, *bus_id,
                    hub->options_.worker.group_bytes};
  WorkerOptions worker_options = hub->options_.worker;
  worker_options.on_tick = [hub = hub.get()] { hub->Tick(); };
  auto worker = Worker::Start(std::move(api), device_api, std::move(worker_options));
  if (!worker.ok()) return worker.status();
  hub->worker_ = *std::move(worker);
  return hub;
}

Hub::~Hub() { Stop(); }

void Hub::Stop() {
  EndAll(absl::UnavailableError("the NCCL transport shuts down"));
  if (worker_ != nullptr) worker_->Stop();
}

void Hub::StopAttaching(const absl::Status& why) {
  std::lock_guard lock(mutex_);
  closed_ = why;
}

void Hub::EndAll(const absl::Status& why) {
  {
    std::lock_guard lock(mutex_);
    closed_ = why;
    while (!pairs_.empty()) End(pairs_.begin()->first, why);
  }
  outbox_.Run();
}

Hub::PairId Hub::Attach(ServiceChannel channel, std::string tenant) {
  auto pair = std::make_unique<Pair>();
  pair->tenant = std::move(tenant);
  pair->channel = std::make_shared<const ServiceChannel>(std::move(channel));
  pair->deadline = Clock::now() + absl::ToChronoNanoseconds(options_.worker.connect_limit);
  PairId id = NewPairId();
  {
    std::lock_guard lock(mutex_);
    while (id == 0 || pairs_.contains(id)) id = NewPairId();
    absl::Status status = closed_;
    status.Update(CheckRoom(pair->tenant));
    pairs_.emplace(id, std::move(pair));
    if (!status.ok()) End(id, status);
  }
  outbox_.Run();
  return id;
}

absl::Status Hub::CheckRoom(const std::string& tenant) const {
  const auto check = [](int64_t attached, const char* whose, int most) {
    if (attached < most) return absl::OkStatus();
    return absl::ResourceExhaustedError(absl::StrCat(
        attached, " NCCL pairs", whose, " are attached, at most ", most, " are allowed"));
  };
  absl::Status status = check(static_cast<int64_t>(pairs_.size()), "", options_.max_pairs);
  const auto own = std::count_if(pairs_.begin(), pairs_.end(),
                                 [&](const auto& entry) { return entry.second->tenant == tenant; });
  status.Update(check(own, " of the tenant", options_.max_pairs_of_tenant));
  return status;
}

void Hub::OnMessage(PairId id, ClientMessage message) {
  {
    std::lock_guard lock(mutex_);
    const auto found = pairs_.find(id);
    if (found == pairs_.end()) return;
    Pair& pair = *found->second;
    pair.heard = Clock::now();
    if (pair.peer != 0) worker_->PeerAlive(pair.peer);
    if (pair.state == State::kHello && !std::holds_alternative<Hello>(message)) {
      End(id, absl::InvalidArgumentError("the first message is not hello"));
    } else {
      std::visit([&](auto&& content) ABSL_EXCLUSIVE_LOCKS_REQUIRED(
                     mutex_) { Handle(id, pair, std::move(content)); },
                 std::move(message));
    }
  }
  outbox_.Run();
}

void Hub::OnEnd(PairId id, const absl::Status& why) {
  {
    std::lock_guard lock(mutex_);
    (void)Forget(id,
                 absl::UnavailableError(absl::StrCat("the control stream ended: ", why.message())));
  }
  outbox_.Run();
}

absl::StatusOr<std::shared_ptr<const PairLife>> Hub::Find(PairId id,
                                                          const std::string& tenant) const {
  std::lock_guard lock(mutex_);
  const auto found = pairs_.find(id);
  if (found == pairs_.end() || found->second->state == State::kHello ||
      found->second->tenant != tenant) {
    return absl::NotFoundError(absl::StrCat("NCCL pair ", id, " is not attached"));
  }
  return found->second->life;
}

void Hub::Submit(PairId id, const std::string& key, Transfer transfer) {
  {
    std::lock_guard lock(mutex_);
    const auto found = pairs_.find(id);
    if (found == pairs_.end()) {
      Tell(std::move(transfer),
           absl::UnavailableError(absl::StrCat("NCCL pair ", id, " is not attached")));
    } else if (absl::Status status = found->second->order.Add(key, transfer); !status.ok()) {
      Tell(std::move(transfer), std::move(status));
    } else {
      Advance(id, *found->second);
    }
  }
  outbox_.Run();
}

void Hub::Cancel(PairId id, const void* owner) {
  {
    std::lock_guard lock(mutex_);
    const auto found = pairs_.find(id);
    if (found == pairs_.end()) return;
    const auto is_owners = [owner](const TransferOrder::Waiting& waiting) {
      return waiting.transfer.owner == owner;
    };
    for (auto& [key, transfer, offered] : found->second->order.Withdraw(is_owners)) {
      Tell(std::move(transfer),
           absl::CancelledError(absl::StrCat(TransferText(key), " was cancelled")));
    }
  }
  outbox_.Run();
}

bool Hub::IsSettled(const Pair& pair) {
  const uint64_t last = pair.order.last_sequence();
  return pair.own_finished == last && pair.client_finished == last;
}

bool Hub::settled() const {
  std::lock_guard lock(mutex_);
  return std::all_of(pairs_.begin(), pairs_.end(),
                     [](const auto& entry) { return IsSettled(*entry.second); });
}

HubStats Hub::stats() const {
  std::lock_guard lock(mutex_);
  HubStats stats = {.pairs = static_cast<int>(pairs_.size()),
                    .communicators = worker_->stats(),
                    .aborts = worker_->aborts()};
  for (const auto& [id, pair] : pairs_) stats.waiting += pair->order.waiting();
  return stats;
}

void Hub::Send(Pair& pair, ServiceMessage message) {
  outbox_.Add([channel = pair.channel, message = std::move(message)]() mutable {
    channel->send(std::move(message));
  });
}

void Hub::Tell(Transfer transfer, absl::Status status) {
  outbox_.Add([transfer = std::move(transfer), status = std::move(status)]() mutable {
    transfer.hold.reset();  // NCCL never had it
    transfer.done(status);
  });
}

void Hub::Handle(PairId id, Pair& pair, Hello hello) {
  absl::Status status = pair.state == State::kHello
                            ? CheckPeer(identity_, hello)
                            : absl::InvalidArgumentError("hello came twice");
  if (!status.ok()) return End(id, status);
  pair.state = State::kIdle;
  Send(pair, Welcome{identity_, id, options_.worker.tick_interval});
  Advance(id, pair);
}

void Hub::Handle(PairId id, Pair& pair, Join join) {
  if (pair.state != State::kJoining || join.generation != pair.generation) {
    return End(id, absl::InvalidArgumentError(absl::StrCat("join of generation ", join.generation,
                                                           " came, which was not asked for")));
  }
  pair.state = State::kConnecting;
  pair.peer = worker_->NewPeer();
  worker_->Connect(
      pair.peer, join.id, /*rank=*/0,
      {[this, id](const absl::Status& status) { OnConnected(id, status); },
       [this, id](const absl::Status& why) { OnLost(id, why); }, [this, id] { OnGone(id); }});
}

void Hub::Handle(PairId id, Pair& pair, Offer offer) {
  const std::string key = offer.key;
  if (absl::Status status = pair.order.Add(std::move(offer)); !status.ok()) {
    Send(pair, Refused{key, std::move(status)});
  } else {
    Advance(id, pair);
  }
}

void Hub::Handle(PairId id, Pair& pair, Finished finished) {
  const uint64_t launched = pair.order.last_sequence();
  if (finished.sequence != pair.client_finished + 1 || finished.sequence > launched) {
    return End(id, absl::InvalidArgumentError(
                       absl::StrCat("finished of sequence ", finished.sequence, " came, of ",
                                    pair.client_finished + 1, " to ", launched, " is due")));
  }
  pair.client_finished = finished.sequence;
  pair.owes_since = Clock::now();
  EvictForThoseWhoWait();
}

void Hub::Handle(PairId, Pair&, Heartbeat) {}

void Hub::Handle(PairId id, Pair&, Broken broken) {
  End(id, absl::UnavailableError(absl::StrCat("the client gave up: ", broken.why)));
}

void Hub::Handle(PairId, Pair& pair, Withdraw withdraw) {
  if (!pair.order.DropOffer(withdraw.key)) return;
  absl::Status why =
      absl::CancelledError(absl::StrCat(TransferText(withdraw.key), " was withdrawn"));
  Send(pair, Refused{std::move(withdraw.key), std::move(why)});
}

void Hub::Advance(PairId id, Pair& pair) {
  for (TransferOrder::Mismatch& one : pair.order.TakeMismatches()) {
    Send(pair, Refused{one.key, one.why});
    Tell(std::move(one.transfer), std::move(one.why));
  }
  if (!pair.order.has_next()) return;
  if (pair.state == State::kConnected) {
    Launch(id, pair);
  } else if (pair.state == State::kIdle) {
    if (cache_.Acquire(id)) {
      StartJoining(pair);
    } else {
      pair.state = State::kWaiting;
      EvictForThoseWhoWait();
    }
  }
}

void Hub::StartJoining(Pair& pair) {
  pair.state = State::kJoining;
  pair.deadline = Clock::now() + absl::ToChronoNanoseconds(options_.worker.connect_limit);
  Send(pair, Connect{++pair.generation});
}

void Hub::Launch(PairId id, Pair& pair) {
  cache_.Touch(id);
  for (TransferOrder::Numbered& one : pair.order.Take()) {
    Send(pair, Order{pair.generation, one.sequence, std::move(one.key)});
    one.transfer.done = [this, id,
                         done = std::move(one.transfer.done)](const absl::Status& status) mutable {
      done(status);
      if (status.ok()) OnOwnFinished(id);
    };
    worker_->Submit(pair.peer, std::move(one.transfer));
  }
}

void Hub::EvictForThoseWhoWait() {
  const auto idle = [this](PairId id) {
    const auto found = pairs_.find(id);
    return found != pairs_.end() && found->second->state == State::kConnected &&
           IsSettled(*found->second);
  };
  while (const std::optional<PairId> victim = cache_.Evict(idle)) {
    Pair& pair = *pairs_.find(*victim)->second;
    pair.state = State::kClosing;
    Send(pair, Close{pair.generation});
    worker_->Close(pair.peer, [](const absl::Status&) {});  // a failure is told by OnLost
  }
}

void Hub::ReleasePlace(PairId id) {
  const std::optional<PairId> next = cache_.Release(id);
  if (next) StartJoining(*pairs_.find(*next)->second);
}

void Hub::End(PairId id, const absl::Status& why) {
  const std::shared_ptr<const ServiceChannel> channel = Forget(id, why);
  if (channel != nullptr) outbox_.Add([channel, why] { channel->end(why); });
}

std::shared_ptr<const Hub::ServiceChannel> Hub::Forget(PairId id, const absl::Status& why) {
  auto ended = pairs_.extract(id);
  if (ended.empty()) return nullptr;
  Pair& pair = *ended.mapped();
  const absl::Status unavailable = absl::UnavailableError(why.message());
  pair.life->End(unavailable);
  const auto all = [](const TransferOrder::Waiting&) { return true; };
  for (auto& [key, transfer, offered] : pair.order.Withdraw(all)) {
    Tell(std::move(transfer), unavailable);
  }
  cache_.Quarantine(id);
  if (pair.peer != 0) {
    worker_->Abort(pair.peer, unavailable);  // OnGone gives the place back
  } else {
    ReleasePlace(id);
  }
  EvictForThoseWhoWait();
  return std::move(pair.channel);
}

void Hub::OnConnected(PairId id, const absl::Status& status) {
  {
    std::lock_guard lock(mutex_);
    const auto found = pairs_.find(id);
    if (found == pairs_.end()) return;
    if (status.ok()) {
      found->second->state = State::kConnected;
      Advance(id, *found->second);
    } else {
      End(id, status);
    }
  }
  outbox_.Run();
}

void Hub::OnLost(PairId id, const absl::Status& why) {
  {
    std::lock_guard lock(mutex_);
    End(id, why);
  }
  outbox_.Run();
}

void Hub::OnGone(PairId id) {
  {
    std::lock_guard lock(mutex_);
    ReleasePlace(id);
    if (const auto found = pairs_.find(id); found != pairs_.end()) {
      Pair& pair = *found->second;
      pair.state = State::kIdle;
      pair.peer = 0;
      Advance(id, pair);
    }
  }
  outbox_.Run();
}

void Hub::OnOwnFinished(PairId id) {
  {
    std::lock_guard lock(mutex_);
    const auto found = pairs_.find(id);
    if (found == pairs_.end()) return;
    Pair& pair = *found->second;
    if (pair.own_finished++ == pair.client_finished) pair.owes_since = Clock::now();
    EvictForThoseWhoWait();
  }
  outbox_.Run();
}

void Hub::Tick() {
  {
    std::lock_guard lock(mutex_);
    const Clock::time_point now = Clock::now();
    const WorkerOptions& limits = options_.worker;
    std::vector<std::pair<PairId, absl::Status>> late;
    for (const auto& [id, pair] : pairs_) {
      if (pair->state != State::kHello) Send(*pair, Heartbeat{});
      WithdrawLate(*pair, now);
      const auto over = [now](Clock::time_point since, absl::Duration limit) {
        return now - since > absl::ToChronoNanoseconds(limit);
      };
      const bool limited = pair->state == State::kHello || pair->state == State::kJoining;
      if (limited && now > pair->deadline) {
        late.emplace_back(id, Silent("", limits.connect_limit));
      } else if (over(pair->heard, limits.silence_limit)) {
        late.emplace_back(id, Silent("", limits.silence_limit));
      } else if (pair->client_finished < pair->own_finished &&
                 over(pair->owes_since, limits.group_limit)) {
        late.emplace_back(
            id, Silent(absl::StrCat(" about the end of transfer ", pair->client_finished + 1),
                       limits.group_limit));
      }
    }
    for (const auto& [id, why] : late) End(id, why);
  }
  outbox_.Run();
}

void Hub::WithdrawLate(Pair& pair, Clock::time_point now) {
  // A communicator that is on its way has a limit of its own.
  const bool comes = pair.state == State::kJoining || pair.state == State::kConnecting;
  const auto is_late = [&](const TransferOrder::Waiting& waiting) {
    return !(waiting.offered && comes) &&
           now - waiting.since > absl::ToChronoNanoseconds(options_.offer_limit);
  };
  for (auto& [key, transfer, offered] : pair.order.Withdraw(is_late)) {
    Tell(std::move(transfer),
         absl::DeadlineExceededError(
             absl::StrCat(TransferText(key), ": ",
                          offered ? "no communicator was free" : "the client did not offer it",
                          " within the limit of ", absl::FormatDuration(options_.offer_limit))));
  }
}

}  // namespace structkv::nccl
