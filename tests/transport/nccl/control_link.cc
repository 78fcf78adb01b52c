#include "tests/transport/nccl/control_link.h"

#include <chrono>
#include <utility>

#include "gtest/gtest.h"
#include "structkv/v1/nccl_codec.h"

namespace structkv::nccl::testing {

ControlLink::ControlLink(Hub* hub, Worker* client, const Identity& identity) : hub_(hub) {
  Channel<ServiceMessage> to_client;
  to_client.send = [this](const ServiceMessage& message) {
    Post([this, bytes = Encode(message).SerializeAsString()] {
      v1::AttachResponse response;
      EXPECT_TRUE(response.ParseFromString(bytes));
      client_->OnMessage(*Decode(response));
    });
  };
  to_client.end = [this](const absl::Status& status) {
    Post([this, status] {
      {
        std::lock_guard lock(mutex_);
        ended_set_ = true;
        ended_ = status;
        changed_.notify_all();
      }
      client_->OnEnd(status);
    });
  };
  Channel<ClientMessage> to_service;
  to_service.send = [this](const ClientMessage& message) {
    if (!drop_finished_ || !std::holds_alternative<Finished>(message)) SendAsClient(message);
  };
  to_service.end = [this](const absl::Status&) {
    Post([this] { hub_->OnEnd(pair_, absl::OkStatus()); });
  };
  pair_ = hub_->Attach(std::move(to_client));
  client_ = ClientPair::Start(client, identity, std::move(to_service),
                              [this](const absl::StatusOr<uint64_t>& attached) {
                                std::lock_guard lock(mutex_);
                                attached_set_ = true;
                                attached_ = attached;
                                changed_.notify_all();
                              });
  thread_ = std::thread([this] { Run(); });
}

ControlLink::~ControlLink() {
  hub_->OnEnd(pair_, absl::CancelledError("the test is over"));
  client_->End();
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  thread_.join();
}

absl::StatusOr<uint64_t> ControlLink::WaitAttached() {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_for(lock, std::chrono::seconds(10), [this] { return attached_set_; })) {
    return absl::DeadlineExceededError("neither attached nor refused");
  }
  return attached_;
}

absl::Status ControlLink::WaitEnded() {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_for(lock, std::chrono::seconds(10), [this] { return ended_set_; })) {
    return absl::DeadlineExceededError("the stream goes on");
  }
  return ended_;
}

void ControlLink::Cut() {
  std::lock_guard lock(mutex_);
  cut_ = true;
}

void ControlLink::Break() {
  const absl::Status why = absl::UnavailableError("connection reset");
  hub_->OnEnd(pair_, why);
  client_->OnEnd(why);
}

void ControlLink::SendAsClient(ClientMessage message) {
  Post([this, bytes = Encode(message).SerializeAsString()] {
    v1::AttachRequest request;
    EXPECT_TRUE(request.ParseFromString(bytes));
    hub_->OnMessage(pair_, *Decode(request));
  });
}

void ControlLink::Post(std::function<void()> deliver) {
  std::lock_guard lock(mutex_);
  if (!cut_) queue_.push_back(std::move(deliver));
  changed_.notify_all();
}

void ControlLink::Run() {
  for (;;) {
    std::function<void()> deliver;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      deliver = std::move(queue_.front());
      queue_.pop_front();
    }
    deliver();
  }
}

}  // namespace structkv::nccl::testing
