#include "service/transport/nccl/client_pair.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "service/transport/nccl/transfer_order.h"

namespace structkv::nccl {

std::shared_ptr<ClientPair> ClientPair::Start(Worker* worker, const Identity& identity,
                                              Channel<ClientMessage> channel, Attached attached) {
  std::shared_ptr<ClientPair> pair(
      new ClientPair(worker, identity, std::move(channel), std::move(attached)));
  {
    std::lock_guard lock(pair->mutex_);
    pair->Send(identity);
  }
  pair->outbox_.Run();
  return pair;
}

void ClientPair::OnMessage(ServiceMessage message) {
  {
    std::lock_guard lock(mutex_);
    if (ended_) return;
    if (peer_ != 0) worker_->PeerAlive(peer_);
  }
  std::visit([this](auto&& content) { Handle(std::move(content)); }, std::move(message));
  outbox_.Run();
}

void ClientPair::OnEnd(const absl::Status& why) {
  Fail(absl::Status(why.ok() ? absl::StatusCode::kUnavailable : why.code(),
                    absl::StrCat("the control stream ended: ", why.message())));
}

void ClientPair::End() { Fail(absl::CancelledError("the client ended the pair")); }

void ClientPair::Offer(const std::string& key, Transfer transfer) {
  nccl::Offer offer{key, transfer.direction, {}};
  for (const Buffer& buffer : transfer.buffers) offer.lengths.push_back(buffer.bytes);
  absl::Status status = CheckOffer(offer);
  {
    std::lock_guard lock(mutex_);
    if (ended_) status.Update(absl::UnavailableError("the NCCL pair has ended"));
    if (status.ok() && offers_.contains(key)) {
      status = absl::AlreadyExistsError(absl::StrCat(TransferText(key), " waits already"));
    }
    if (status.ok()) {
      offers_.emplace(key, std::move(transfer));
      Send(std::move(offer));
    } else {
      Tell(std::move(transfer), std::move(status));
    }
  }
  outbox_.Run();
}

void ClientPair::Withdraw(const std::string& key) {
  {
    std::lock_guard lock(mutex_);
    if (offers_.contains(key)) Send(nccl::Withdraw{key});
  }
  outbox_.Run();
}

void ClientPair::Handle(Welcome welcome) {
  absl::Status status = CheckPeer(identity_, welcome.identity);
  const absl::Duration silence = worker_->options().silence_limit;
  if (status.ok() && welcome.heartbeat_interval * 2 > silence) {
    status = absl::FailedPreconditionError(absl::StrCat(
        "heartbeat_interval is ", absl::FormatDuration(welcome.heartbeat_interval),
        ", at most half of the silence_limit of ", absl::FormatDuration(silence), " is allowed"));
  }
  if (!status.ok()) return Fail(status);
  std::lock_guard lock(mutex_);
  if (!attached_) return;
  outbox_.Add([attached = std::exchange(attached_, nullptr), name = welcome.pair]() mutable {
    attached(name);
  });
}

void ClientPair::Handle(Connect connect) {
  // The id is made here, not by the service: one that nobody comes to costs who made it.
  worker_->MakeId([self = shared_from_this(), generation = connect.generation](
                      const absl::StatusOr<UniqueId>& id) { self->Join(generation, id); });
}

void ClientPair::Join(uint64_t generation, const absl::StatusOr<UniqueId>& id) {
  if (!id.ok()) return Fail(id.status());
  const auto fail = [self = shared_from_this()](const absl::Status& status) {
    if (!status.ok()) self->Fail(status);
  };
  {
    std::lock_guard lock(mutex_);
    if (ended_) return;
    generation_ = generation;
    peer_ = worker_->NewPeer();
    worker_->Connect(peer_, *id, /*rank=*/1, {fail, fail, {}});
    Send(nccl::Join{generation, *id});
  }
  outbox_.Run();
}

void ClientPair::Handle(Order order) {
  absl::Status status;
  {
    std::lock_guard lock(mutex_);
    auto offer = offers_.extract(order.key);
    if (!offer.empty() && order.generation == generation_ && order.sequence == last_sequence_ + 1) {
      last_sequence_ = order.sequence;
      Transfer& transfer = offer.mapped();
      transfer.done = [self = shared_from_this(), sequence = order.sequence,
                       done = std::move(transfer.done)](const absl::Status& result) mutable {
        done(result);
        if (result.ok()) self->Finish(sequence);
      };
      worker_->Submit(peer_, std::move(transfer));
      return;
    }
    status = absl::InvalidArgumentError(absl::StrCat(
        "the service ordered ", TransferText(order.key), " of generation ", order.generation,
        " as ", order.sequence, offer.empty() ? ", which was not offered" : "", "; generation ",
        generation_, " and ", last_sequence_ + 1, " are due"));
    if (!offer.empty()) offers_.insert(std::move(offer));
  }
  Fail(status);
}

void ClientPair::Finish(uint64_t sequence) {
  {
    std::lock_guard lock(mutex_);
    Send(Finished{sequence});
  }
  outbox_.Run();
}

void ClientPair::Handle(Refused refused) {
  std::lock_guard lock(mutex_);
  auto offer = offers_.extract(refused.key);
  if (!offer.empty()) Tell(std::move(offer.mapped()), refused.why);
}

void ClientPair::Handle(Close close) {
  std::lock_guard lock(mutex_);
  if (ended_ || close.generation != generation_) return;
  worker_->Close(std::exchange(peer_, 0), [](const absl::Status&) {});  // a failure is told as lost
}

void ClientPair::Handle(Heartbeat) {
  std::lock_guard lock(mutex_);
  Send(Heartbeat{});
}

void ClientPair::Fail(const absl::Status& why) {
  {
    std::lock_guard lock(mutex_);
    if (ended_) return;
    const absl::Status unavailable = absl::UnavailableError(why.message());
    if (peer_ != 0) worker_->Abort(peer_, unavailable);
    for (auto& [key, transfer] : std::exchange(offers_, {})) {
      Tell(std::move(transfer), unavailable);
    }
    Send(Broken{std::string(why.message())});
    ended_ = true;
    outbox_.Add([self = shared_from_this(), why] { self->channel_.end(why); });
    if (attached_) {
      outbox_.Add([attached = std::exchange(attached_, nullptr), why]() mutable { attached(why); });
    }
  }
  outbox_.Run();
}

void ClientPair::Send(ClientMessage message) {
  if (ended_) return;
  outbox_.Add([self = shared_from_this(), message = std::move(message)]() mutable {
    self->channel_.send(std::move(message));
  });
}

void ClientPair::Tell(Transfer transfer, absl::Status status) {
  outbox_.Add([transfer = std::move(transfer), status = std::move(status)]() mutable {
    transfer.hold.reset();  // NCCL never had it
    transfer.done(status);
  });
}

}  // namespace structkv::nccl
