#include "service/rpc/connection_handover.h"

#include <memory>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace structkv::rpc {
namespace {

using ::testing::IsSupersetOf;
using ::testing::UnorderedElementsAre;

// Keeps the threads that bring it certain connections, as gRPC does while their peers send.
class FakeAcceptor final : public ConnectionHandover::Acceptor {
 public:
  void HandleNewConnection(NewConnectionParameters* parameters) override {
    absl::MutexLock lock(&mutex_);
    seen_.push_back(parameters->fd);
    if (parameters->fd >= kLoud) {
      mutex_.Await(absl::Condition(&silence_));
    }
  }

  static constexpr int kLoud = 100;

  size_t count() {
    absl::MutexLock lock(&mutex_);
    return seen_.size();
  }
  // Waits until so many connections came.
  std::vector<int> WaitFor(size_t count) {
    absl::MutexLock lock(&mutex_);
    const auto enough = [&] { return seen_.size() >= count; };
    mutex_.Await(absl::Condition(&enough));
    return seen_;
  }
  void Silence() {
    absl::MutexLock lock(&mutex_);
    silence_ = true;
  }

 private:
  absl::Mutex mutex_;
  std::vector<int> seen_;
  bool silence_ = false;
};

TEST(ConnectionHandoverTest, ALoudConnectionKeepsNobodyElseWaiting) {
  FakeAcceptor acceptor;
  ConnectionHandover handover;
  for (int fd = 1; fd <= 3; ++fd) {
    handover.Give(&acceptor, FakeAcceptor::kLoud + fd);
    handover.Give(&acceptor, fd);
  }
  EXPECT_THAT(acceptor.WaitFor(6), UnorderedElementsAre(1, 2, 3, 101, 102, 103));
  acceptor.Silence();
}

// More of them than threads that there are from the start: one that comes then waits for a moment.
TEST(ConnectionHandoverTest, ManyLoudConnectionsKeepNobodyWaitingForLong) {
  constexpr int kLoudOnes = 12;
  static_assert(kLoudOnes > ConnectionHandover::kThreads);
  FakeAcceptor acceptor;
  ConnectionHandover handover;
  for (int i = 0; i < kLoudOnes; ++i) handover.Give(&acceptor, FakeAcceptor::kLoud + i);
  handover.Give(&acceptor, 1);
  while (acceptor.count() < kLoudOnes + 1) {
    handover.Look();
    absl::SleepFor(absl::Milliseconds(1));
  }
  EXPECT_THAT(acceptor.WaitFor(kLoudOnes + 1), IsSupersetOf({1, 100, 111}));
  acceptor.Silence();
}

TEST(ConnectionHandoverTest, WhatWasGivenIsHandedOverBeforeTheEnd) {
  FakeAcceptor acceptor;
  acceptor.Silence();
  {
    ConnectionHandover handover;
    for (int fd = 1; fd <= 200; ++fd) handover.Give(&acceptor, fd);
  }
  EXPECT_THAT(acceptor.WaitFor(200), IsSupersetOf({1, 100, 200}));
}

}  // namespace
}  // namespace structkv::rpc
