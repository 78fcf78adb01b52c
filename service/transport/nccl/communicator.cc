#include "service/transport/nccl/communicator.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace structkv::nccl {

Communicator::Communicator(const Api* api, const DeviceApi* device, const WorkerOptions* options,
                           PeerId peer)
    : api_(api), device_(device), options_(options), peer_(peer) {}

absl::Status Communicator::Connect(const UniqueId& id, int rank, Done done) {
  rank_ = rank;
  connected_ = std::move(done);
  absl::StatusOr<Stream*> stream = device_->create_stream();
  if (!stream.ok()) return stream.status();
  stream_ = *stream;
  Config config;
  config.blocking = 0;
  config.max_ctas = options_->max_channels;
  Enter(State::kConnecting, options_->connect_limit);
  return api_->ToStatus(api_->call().comm_init_rank_config(&comm_, 2, id, rank, &config),
                        Name("ncclCommInitRankConfig"), comm_);
}

void Communicator::Add(Transfer transfer) { queue_.push_back(std::move(transfer)); }

void Communicator::Close(Done done) { closing_ = std::move(done); }

absl::Status Communicator::Step() {
  for (;;) {
    absl::StatusOr<bool> ready = true;
    switch (state_) {
      case State::kConnecting:
        ready = Ready("connecting");
        if (!ready.ok()) return ready.status();
        if (!*ready) return CheckDeadline();
        state_ = State::kIdle;
        std::exchange(connected_, nullptr)(absl::OkStatus());
        break;
      case State::kIdle:
        if (!queue_.empty()) {
          if (absl::Status status = PostGroup(); !status.ok()) return status;
        } else if (closing_) {
          if (absl::Status status = StartClosing(); !status.ok()) return status;
        } else {
          return absl::OkStatus();
        }
        break;
      case State::kPosting:
        // Until then nothing is on the stream, which would look done.
        ready = Ready("posting");
        if (!ready.ok()) return ready.status();
        if (!*ready) return CheckDeadline();
        state_ = State::kRunning;
        break;
      case State::kRunning:
        ready = Ready("transferring");
        if (!ready.ok()) return ready.status();
        ready = device_->stream_done(stream_);
        if (!ready.ok()) return ready.status();
        if (!*ready) return CheckDeadline();
        state_ = State::kIdle;
        break;
      case State::kClosing:
        ready = Ready("closing");
        if (!ready.ok()) return ready.status();
        if (!*ready) return CheckDeadline();
        state_ = State::kClosed;
        break;
      case State::kClosed:
        return absl::OkStatus();
    }
  }
}

absl::Status Communicator::PostGroup() {
  Transfer& transfer = queue_.front();
  if (!posted_) {
    groups_ = PlanGroups(transfer.buffers, options_->group_bytes);
    next_group_ = 0;
    posted_ = true;
    if (transfer.after != nullptr) {
      absl::Status status = device_->wait_event(stream_, transfer.after);
      if (!status.ok()) return status;
    }
  }
  if (next_group_ == groups_.size()) {
    Transfer finished = std::move(transfer);
    queue_.pop_front();
    posted_ = false;
    finished.hold.reset();
    finished.done(absl::OkStatus());
    return absl::OkStatus();
  }
  const Functions& call = api_->call();
  absl::Status status = api_->ToStatus(call.group_start(), Name("ncclGroupStart"), comm_);
  if (!status.ok()) return status;
  const int peer_rank = 1 - rank_;
  for (const Piece& piece : groups_[next_group_]) {
    const size_t bytes = static_cast<size_t>(piece.bytes);
    const Result result = transfer.direction == Direction::kSend
                              ? call.send(piece.data, bytes, kBytes, peer_rank, comm_, stream_)
                              : call.receive(piece.data, bytes, kBytes, peer_rank, comm_, stream_);
    status.Update(api_->ToStatus(result, Name("ncclSend or ncclRecv"), comm_));
  }
  // Also after an error: the group is the thread's, and other communicators share it.
  status.Update(api_->ToStatus(call.group_end(), Name("ncclGroupEnd"), comm_));
  if (!status.ok()) return status;
  ++next_group_;
  Enter(State::kPosting, options_->group_limit);
  return absl::OkStatus();
}

absl::Status Communicator::StartClosing() {
  Enter(State::kClosing, options_->close_limit);
  return api_->ToStatus(api_->call().comm_finalize(comm_), Name("ncclCommFinalize"), comm_);
}

absl::StatusOr<bool> Communicator::Ready(const char* what) {
  Result error = Result::kSuccess;
  const Result result = api_->call().comm_get_async_error(comm_, &error);
  absl::Status status = api_->ToStatus(result, Name(what), comm_);
  status.Update(api_->ToStatus(error, Name(what), comm_));
  if (!status.ok()) return status;
  return error == Result::kSuccess;
}

void Communicator::Enter(State state, absl::Duration limit) {
  state_ = state;
  deadline_ = Clock::now() + absl::ToChronoNanoseconds(limit);
}

absl::Status Communicator::CheckDeadline() const {
  if (Clock::now() < deadline_) return absl::OkStatus();
  switch (state_) {
    case State::kConnecting:
      return absl::UnavailableError(absl::StrCat(Name("connecting"), " took longer than ",
                                                 absl::FormatDuration(options_->connect_limit)));
    case State::kClosing:
      return absl::UnavailableError(absl::StrCat(Name("closing"), " took longer than ",
                                                 absl::FormatDuration(options_->close_limit)));
    default:
      return absl::UnavailableError(absl::StrCat(Name("a group of transfers"), " took longer than ",
                                                 absl::FormatDuration(options_->group_limit)));
  }
}

absl::Status Communicator::CheckPeer() const {
  if (Clock::now() - heard_ <= absl::ToChronoNanoseconds(options_->silence_limit)) {
    return absl::OkStatus();
  }
  return absl::UnavailableError(absl::StrCat(Name("the peer"), " was silent for longer than ",
                                             absl::FormatDuration(options_->silence_limit)));
}

Remains Communicator::Fail(const absl::Status& why) {
  Remains remains{peer_, comm_, stream_, /*abort=*/true, {}};
  if (connected_) std::exchange(connected_, nullptr)(why);
  for (Transfer& transfer : std::exchange(queue_, {})) {
    remains.holds.push_back(std::move(transfer.hold));
    transfer.done(why);
  }
  if (closing_) std::exchange(closing_, nullptr)(why);
  return remains;
}

Remains Communicator::TakeClosed() {
  std::exchange(closing_, nullptr)(absl::OkStatus());
  return {peer_, comm_, stream_, /*abort=*/false, {}};
}

std::string Communicator::Name(const char* what) const {
  return absl::StrCat("NCCL pair ", peer_, ": ", what);
}

}  // namespace structkv::nccl
