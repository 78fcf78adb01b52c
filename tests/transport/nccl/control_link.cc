#include "tests/transport/nccl/control_link.h"

#include <chrono>
#include <utility>

#include "gtest/gtest.h"
#include "structkv/v1/nccl_codec.h"

namespace structkv::nccl::testing {

ControlLink::ControlLink(Hub* hub, Worker* client, const Identity& identity) : hub_(hub) {
  Channel<ServiceMessage> to_client;
  to_client.send = [this, state = state_](const ServiceMessage& message) {
    state->Post([this, bytes = Encode(message).SerializeAsString()] {
      v1::AttachResponse response;
      EXPECT_TRUE(response.ParseFromString(bytes));
      client_->OnMessage(*Decode(response));
    });
  };
  to_client.end = [this, state = state_](const absl::Status& status) {
    state->Post([this, status] {
      state_->SetEnded(status);
      client_->OnEnd(status);
    });
  };
  Channel<ClientMessage> to_service;
  to_service.send = [this, state = state_](const ClientMessage& message) {
    {
      std::lock_guard lock(state->mutex);
      if (state->drop_finished && std::holds_alternative<Finished>(message)) return;
    }
    state->Post(Delivery(this, message));
  };
  to_service.end = [this, state = state_](const absl::Status&) {
    state->Post([this] { hub_->OnEnd(pair_, absl::OkStatus()); });
  };
  pair_ = hub_->Attach(std::move(to_client));
  client_ = ClientPair::Start(client, identity, std::move(to_service),
                              [state = state_](const absl::StatusOr<uint64_t>& attached) {
                                std::lock_guard lock(state->mutex);
                                state->attached = attached;
                                state->changed.notify_all();
                              });
  thread_ = std::thread([this] { Run(); });
}

ControlLink::~ControlLink() {
  hub_->OnEnd(pair_, absl::CancelledError("the test is over"));
  client_->End();
  {
    std::lock_guard lock(state_->mutex);
    state_->stopping = true;
    state_->changed.notify_all();
  }
  thread_.join();
}

absl::StatusOr<uint64_t> ControlLink::WaitAttached() {
  std::unique_lock lock(state_->mutex);
  if (!state_->changed.wait_for(lock, std::chrono::seconds(10),
                                [this] { return state_->attached.has_value(); })) {
    return absl::DeadlineExceededError("neither attached nor refused");
  }
  return *state_->attached;
}

absl::Status ControlLink::WaitEnded() {
  std::unique_lock lock(state_->mutex);
  if (!state_->changed.wait_for(lock, std::chrono::seconds(10),
                                [this] { return state_->ended.has_value(); })) {
    return absl::DeadlineExceededError("the stream goes on");
  }
  return *state_->ended;
}

void ControlLink::Cut() {
  std::lock_guard lock(state_->mutex);
  state_->cut = true;
}

void ControlLink::DropFinished() {
  std::lock_guard lock(state_->mutex);
  state_->drop_finished = true;
}

void ControlLink::Break() {
  const absl::Status why = absl::UnavailableError("connection reset");
  hub_->OnEnd(pair_, why);
  client_->OnEnd(why);
}

void ControlLink::SendAsClient(const ClientMessage& message) {
  state_->Post(Delivery(this, message));
}

std::function<void()> ControlLink::Delivery(ControlLink* link, const ClientMessage& message) {
  return [link, bytes = Encode(message).SerializeAsString()] {
    v1::AttachRequest request;
    EXPECT_TRUE(request.ParseFromString(bytes));
    link->hub_->OnMessage(link->pair_, *Decode(request));
  };
}

void ControlLink::Run() {
  for (;;) {
    std::function<void()> deliver;
    {
      std::unique_lock lock(state_->mutex);
      state_->changed.wait(lock, [this] { return state_->stopping || !state_->queue.empty(); });
      if (state_->queue.empty()) return;
      deliver = std::move(state_->queue.front());
      state_->queue.pop_front();
    }
    deliver();
  }
}

void ControlLink::State::Post(std::function<void()> deliver) {
  std::lock_guard lock(mutex);
  if (!cut && !stopping) queue.push_back(std::move(deliver));
  changed.notify_all();
}

void ControlLink::State::SetEnded(const absl::Status& status) {
  std::lock_guard lock(mutex);
  ended = status;
  changed.notify_all();
}

}  // namespace structkv::nccl::testing
