// A backend that is lost while prompts run, as a GPU is after an error that only a new process
// clears.
#include "tests/testing/lost_backend.h"

#include <csignal>
#include <memory>
#include <string>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "service/serve_loop.h"
#include "tests/session/fault_backend.h"
#include "tests/testing/health.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

constexpr char kCause[] = "GPU 0 failed: an illegal memory access was encountered";

// A signal that this thread does not take while the object lives.
class BlockedSignal {
 public:
  explicit BlockedSignal(int signal) {
    sigemptyset(&set_);
    sigaddset(&set_, signal);
    pthread_sigmask(SIG_BLOCK, &set_, &before_);
  }
  ~BlockedSignal() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  BlockedSignal(const BlockedSignal&) = delete;
  BlockedSignal& operator=(const BlockedSignal&) = delete;

  const sigset_t& set() const { return set_; }

 private:
  sigset_t set_;
  sigset_t before_;
};

class LostBackendTest : public ServiceTest {
 protected:
  void SetUp() override {
    StartAlone(TestOptions(), session::MakeFaultBackend(*CreateBackend("auto"), faults_));
  }

  void Lose() { faults_->Lose(absl::UnavailableError(kCause)); }

  const std::shared_ptr<session::Faults> faults_ = std::make_shared<session::Faults>();
};

TEST_F(LostBackendTest, ALayerThatWasBeingComputedFails) {
  const PromptData data(SmallOpen(200), 1);
  faults_->CloseGate(200);
  Call call(channel());
  call.Send(OpenMessage(data.open()));
  call.WaitForOpened();
  call.Send(LayerMessage(data, 0));
  ASSERT_TRUE(faults_->WaitUntilBlocked(200));
  Lose();
  faults_->OpenAllGates();
  const Outcome outcome = call.Finish();
  ExpectFailure(outcome, grpc::StatusCode::UNAVAILABLE, {kCause});
  for (const v1::CompressResponse& response : outcome.responses) {
    EXPECT_FALSE(response.has_layer()) << "what a lost backend wrote was sent";
  }
  ExpectNothingHeld();
}

TEST_F(LostBackendTest, NewPromptsAreRefused) {
  Lose();
  ExpectFailure(Run(AllMessages(PromptData(SmallOpen(200), 1))), grpc::StatusCode::UNAVAILABLE,
                {kCause});
  ExpectNothingHeld();
}

TEST_F(LostBackendTest, TheProcessIsToEnd) {
  // One stream waits for its caller, one for its layer.
  const PromptData idle_data(SmallOpen(200), 1);
  Call idle(channel());
  idle.Send(OpenMessage(idle_data.open()));
  idle.WaitForOpened();
  const PromptData stuck_data(SmallOpen(300), 2);
  faults_->CloseGate(300);
  Call stuck(channel());
  stuck.Send(OpenMessage(stuck_data.open()));
  stuck.WaitForOpened();
  stuck.Send(LayerMessage(stuck_data, 0));
  ASSERT_TRUE(faults_->WaitUntilBlocked(300));
  EXPECT_EQ(Health(channel()), "SERVING");
  ExpectEndsAsLost(
      &server(), [this] { Lose(); }, kCause);
  EXPECT_EQ(Health(channel()), "NOT_SERVING");
  ExpectFailure(idle.Finish(), grpc::StatusCode::UNAVAILABLE, {kCause});
  ExpectFailure(stuck.Finish(), grpc::StatusCode::UNAVAILABLE, {kCause});
  ExpectFailure(Run(AllMessages(idle_data)), grpc::StatusCode::UNAVAILABLE, {kCause});
  faults_->OpenAllGates();
  ExpectNothingHeld();
}

// Streams, and caches that are held, would have the drain last as long as its limit.
TEST_F(LostBackendTest, ADrainEndsToo) {
  const PromptData data(SmallOpen(200), 1);
  Call idle(channel());
  idle.Send(OpenMessage(data.open()));
  idle.WaitForOpened();
  const BlockedSignal blocked(SIGTERM);
  const pthread_t self = pthread_self();
  ExpectEndsAsLost(&server(),
                   [&] {
                     pthread_kill(self, SIGTERM);
                     EXPECT_TRUE(Eventually([&] { return server().drain_progress().has_value(); }));
                     Lose();
                   },
                   kCause, {SIGTERM});
  ExpectFailure(idle.Finish(), grpc::StatusCode::UNAVAILABLE, {kCause});
}

TEST_F(LostBackendTest, ASignalDrainsAWellOne) {
  const BlockedSignal blocked(SIGTERM);
  const pthread_t self = pthread_self();
  std::thread sender([self] { pthread_kill(self, SIGTERM); });
  rpc::Log log(rpc::LogFormat::kText);
  const ServeEnd end = ServeUntilEnd(&server(), blocked.set(), {}, &log);
  sender.join();
  EXPECT_EQ(end.exit_code, 0);
  EXPECT_FALSE(end.at_once);
}

}  // namespace
}  // namespace structkv::testkit
