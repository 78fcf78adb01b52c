#include "service/transport/nccl/worker.h"

#include <algorithm>
#include <future>
#include <utility>

#include "absl/strings/str_cat.h"

namespace structkv::nccl {
namespace {

absl::Status AtLeast(const char* name, int64_t value, int64_t least) {
  if (value >= least) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " is ", value, ", at least ", least));
}

absl::Status Positive(const char* name, absl::Duration value) {
  if (value > absl::ZeroDuration()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " is ", absl::FormatDuration(value), ", above 0 is needed"));
}

absl::Status Validate(const WorkerOptions& options) {
  absl::Status status = AtLeast("device", options.device, 0);
  status.Update(AtLeast("max_communicators", options.max_communicators, 1));
  status.Update(AtLeast("max_channels", options.max_channels, 1));
  status.Update(AtLeast("group_bytes", options.group_bytes, 1));
  status.Update(Positive("connect_limit", options.connect_limit));
  status.Update(Positive("group_limit", options.group_limit));
  status.Update(Positive("close_limit", options.close_limit));
  status.Update(Positive("silence_limit", options.silence_limit));
  status.Update(Positive("abort_limit", options.abort_limit));
  status.Update(Positive("poll_interval", options.poll_interval));
  status.Update(Positive("tick_interval", options.tick_interval));
  return status;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Worker>> Worker::Start(std::shared_ptr<const Api> api,
                                                      const DeviceApi& device_api,
                                                      WorkerOptions options) {
  if (absl::Status status = Validate(options); !status.ok()) return status;
  std::unique_ptr<Worker> worker(new Worker(std::move(api), device_api, std::move(options)));
  std::promise<absl::Status> started;
  worker->thread_ = std::thread([&started, worker = worker.get()] {
    const absl::Status status = worker->device_api_.set_device(worker->options_.device);
    worker->stopping_ = !status.ok();
    started.set_value(status);  // `started` may be gone from here on
    worker->Run();
  });
  absl::Status status = started.get_future().get();
  if (!status.ok()) return status;
  return worker;
}

Worker::Worker(std::shared_ptr<const Api> api, const DeviceApi& device_api, WorkerOptions options)
    : api_(std::move(api)),
      device_api_(device_api),
      options_(std::move(options)),
      reclaimer_(api_, device_api_, options_.device,
                 [inbox = inbox_, this](const std::vector<PeerId>& peers) {
                   // Dropped where this worker is gone.
                   inbox->Post([this, peers] { Gone(peers); });
                 }) {}

Worker::~Worker() { Stop(); }

void Worker::Stop() {
  if (!thread_.joinable()) return;
  inbox_->Post([this] { stopping_ = true; });
  thread_.join();
  (void)reclaimer_.WaitUntilEmpty(options_.abort_limit);
}

void Worker::MakeId(absl::AnyInvocable<void(absl::StatusOr<UniqueId>)> done) {
  inbox_->Post([this, done = std::move(done)]() mutable {
    UniqueId id;
    absl::Status status = api_->ToStatus(api_->call().get_unique_id(&id), "ncclGetUniqueId");
    if (status.ok()) {
      done(id);
    } else {
      done(status);
    }
  });
}

void Worker::Connect(PeerId peer, const UniqueId& id, int rank, PeerEvents events) {
  inbox_->Post([this, peer, id, rank, events = std::move(events)]() mutable {
    if (live_ + reclaiming_ >= options_.max_communicators) {
      events.connected(absl::ResourceExhaustedError(absl::StrCat(
          "all ", options_.max_communicators, " NCCL communicators of device ", options_.device,
          " are taken, ", reclaiming_.load(), " of them are being given back")));
      return;
    }
    if (peers_.contains(peer) || on_gone_.contains(peer)) {
      events.connected(
          absl::AlreadyExistsError(absl::StrCat("NCCL pair ", peer, " has a communicator")));
      return;
    }
    auto communicator = std::make_unique<Communicator>(api_.get(), &device_api_, &options_, peer);
    Communicator* const connecting = communicator.get();
    Done connected = std::move(events.connected);
    peers_.emplace(peer, Peer{std::move(communicator), std::move(events)});
    ++live_;
    absl::Status status = connecting->Connect(id, rank, std::move(connected));
    if (!status.ok()) Lose(peer, status);
  });
}

void Worker::Submit(PeerId peer, Transfer transfer) {
  inbox_->Post([this, peer, transfer = std::move(transfer)]() mutable {
    if (Communicator* const communicator = Find(peer)) {
      communicator->Add(std::move(transfer));
    } else {
      transfer.done(absl::UnavailableError(absl::StrCat("NCCL pair ", peer, " is closed")));
    }
  });
}

void Worker::Close(PeerId peer, Done done) {
  inbox_->Post([this, peer, done = std::move(done)]() mutable {
    if (Communicator* const communicator = Find(peer)) {
      communicator->Close(std::move(done));
    } else {
      done(absl::UnavailableError(absl::StrCat("NCCL pair ", peer, " is closed")));
    }
  });
}

void Worker::Abort(PeerId peer, absl::Status why) {
  inbox_->Post([this, peer, why = std::move(why)] { Lose(peer, why); });
}

void Worker::PeerAlive(PeerId peer) {
  inbox_->Post([this, peer] {
    if (Communicator* const communicator = Find(peer)) communicator->PeerAlive();
  });
}

void Worker::Run() {
  const auto tick_interval = absl::ToChronoNanoseconds(options_.tick_interval);
  Clock::time_point next_tick = Clock::now() + tick_interval;
  while (!stopping_) {
    for (Inbox::Job& job : inbox_->Take(NextWait())) job();
    StepAll();
    GiveBackLost();
    if (const Clock::time_point now = Clock::now(); now >= next_tick) {
      next_tick = now + tick_interval;
      if (options_.on_tick) options_.on_tick();
    }
  }
  // What was posted before the end gets its answer too.
  for (Inbox::Job& job : inbox_->Take(absl::ZeroDuration())) job();
  inbox_->Close();
  while (!peers_.empty()) {
    Lose(peers_.begin()->first, absl::UnavailableError("the NCCL transport shuts down"));
  }
  GiveBackLost();
}

void Worker::StepAll() {
  std::vector<std::pair<PeerId, absl::Status>> failed;
  std::vector<Remains> closed;
  for (const auto& [id, peer] : peers_) {
    absl::Status status = peer.communicator->Step();
    status.Update(peer.communicator->CheckPeer());
    if (!status.ok()) {
      failed.emplace_back(id, std::move(status));
    } else if (peer.communicator->closed()) {
      closed.push_back(peer.communicator->TakeClosed());
    }
  }
  for (const auto& [id, status] : failed) Lose(id, status);
  for (const Remains& remains : closed) {
    on_gone_.emplace(remains.peer, std::move(peers_.extract(remains.peer).mapped().events.gone));
  }
  live_ -= static_cast<int>(closed.size());
  reclaiming_ += static_cast<int>(closed.size());
  reclaimer_.Take(std::move(closed));
}

Communicator* Worker::Find(PeerId peer) {
  const auto found = peers_.find(peer);
  return found == peers_.end() ? nullptr : found->second.communicator.get();
}

void Worker::Lose(PeerId peer, const absl::Status& why) {
  auto lost = peers_.extract(peer);
  if (lost.empty()) return;
  auto& [communicator, events] = lost.mapped();
  const absl::Status unavailable = absl::UnavailableError(why.message());
  --live_;
  ++reclaiming_;
  lost_.push_back(communicator->Fail(unavailable));
  if (lost_.back().comm != nullptr) ++aborts_;
  on_gone_.emplace(peer, std::move(events.gone));
  if (events.lost) events.lost(unavailable);
}

// All that were lost in one round: as one group.
void Worker::GiveBackLost() { reclaimer_.Take(std::exchange(lost_, {})); }

void Worker::Gone(const std::vector<PeerId>& peers) {
  reclaiming_ -= static_cast<int>(peers.size());
  for (PeerId peer : peers) {
    auto gone = on_gone_.extract(peer);
    if (gone.mapped()) gone.mapped()();
  }
}

absl::Duration Worker::NextWait() const {
  const bool busy = std::any_of(peers_.begin(), peers_.end(), [](const auto& entry) {
    return entry.second.communicator->busy();
  });
  return busy ? options_.poll_interval : options_.tick_interval;
}

}  // namespace structkv::nccl
