#include "tests/transport/nccl/control_link.h"

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
        absl::MutexLock lock(&mutex_);
        ended_set_ = true;
        ended_ = status;
      }
      client_->OnEnd(status);
    });
  };
  Channel<ClientMessage> to_service;
  to_service.send = [this](const ClientMessage& message) { SendAsClient(message); };
  to_service.end = [this](const absl::Status&) {
    Post([this] { hub_->OnEnd(pair_, absl::OkStatus()); });
  };
  pair_ = hub_->Attach(std::move(to_client));
  client_ = ClientPair::Start(client, identity, std::move(to_service),
                              [this](const absl::StatusOr<uint64_t>& attached) {
                                absl::MutexLock lock(&mutex_);
                                attached_set_ = true;
                                attached_ = attached;
                              });
  thread_ = std::thread([this] { Run(); });
}

ControlLink::~ControlLink() {
  hub_->OnEnd(pair_, absl::CancelledError("the test is over"));
  client_->End();
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

absl::StatusOr<uint64_t> ControlLink::WaitAttached() {
  absl::MutexLock lock(&mutex_);
  if (!mutex_.AwaitWithTimeout(absl::Condition(&attached_set_), absl::Seconds(10))) {
    return absl::DeadlineExceededError("neither attached nor refused");
  }
  return attached_;
}

absl::Status ControlLink::WaitEnded() {
  absl::MutexLock lock(&mutex_);
  if (!mutex_.AwaitWithTimeout(absl::Condition(&ended_set_), absl::Seconds(10))) {
    return absl::DeadlineExceededError("the stream goes on");
  }
  return ended_;
}

void ControlLink::Cut() {
  absl::MutexLock lock(&mutex_);
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
  absl::MutexLock lock(&mutex_);
  if (!cut_) queue_.push_back(std::move(deliver));
}

void ControlLink::Run() {
  for (;;) {
    std::function<void()> deliver;
    {
      absl::MutexLock lock(&mutex_);
      const auto ready = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return stopping_ || !queue_.empty();
      };
      mutex_.Await(absl::Condition(&ready));
      if (queue_.empty()) return;
      deliver = std::move(queue_.front());
      queue_.pop_front();
    }
    deliver();
  }
}

}  // namespace structkv::nccl::testing
