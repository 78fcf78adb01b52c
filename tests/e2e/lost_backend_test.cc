// A backend that is lost while prompts run, as a GPU is after an error that only a new process
// clears.
#include <unistd.h>

#include <csignal>
#include <memory>
#include <string>
#include <thread>

#include "absl/time/clock.h"
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

class LostBackendTest : public ::testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Server>> server =
        Server::Start(TestOptions(), session::MakeFaultBackend(*CreateBackend("auto"), faults_));
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    channel_ = NewChannel("127.0.0.1:" + std::to_string(server_->port()));
  }

  void Lose() { faults_->Lose(absl::UnavailableError(kCause)); }

  void ExpectNothingHeld() const {
    EXPECT_TRUE(Eventually([&] {
      const session::SessionManager& sessions = server_->sessions();
      return sessions.budget().reserved_bytes() == 0 && sessions.buffers().in_use_bytes() == 0 &&
             sessions.active_sessions() == 0 && server_->active_streams() == 0;
    }));
  }

  const std::shared_ptr<session::Faults> faults_ = std::make_shared<session::Faults>();
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST_F(LostBackendTest, ALayerThatWasBeingComputedFails) {
  const PromptData data(SmallOpen(200), 1);
  faults_->CloseGate(200);
  Call call(channel_);
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
  ExpectFailure(testkit::Run(channel_, AllMessages(PromptData(SmallOpen(200), 1))),
                grpc::StatusCode::UNAVAILABLE, {kCause});
  ExpectNothingHeld();
}

TEST_F(LostBackendTest, TheProcessIsToEnd) {
  // One stream waits for its caller, one for its layer.
  const PromptData idle_data(SmallOpen(200), 1);
  Call idle(channel_);
  idle.Send(OpenMessage(idle_data.open()));
  idle.WaitForOpened();
  const PromptData stuck_data(SmallOpen(300), 2);
  faults_->CloseGate(300);
  Call stuck(channel_);
  stuck.Send(OpenMessage(stuck_data.open()));
  stuck.WaitForOpened();
  stuck.Send(LayerMessage(stuck_data, 0));
  ASSERT_TRUE(faults_->WaitUntilBlocked(300));
  EXPECT_EQ(Health(channel_), "SERVING");

  int log_pipe[2];
  ASSERT_EQ(pipe(log_pipe), 0);
  rpc::Log log(rpc::LogFormat::kText, log_pipe[1]);
  sigset_t none;
  sigemptyset(&none);
  const absl::Time begin = absl::Now();
  std::thread loser([this] { Lose(); });
  const ServeEnd end = ServeUntilEnd(server_.get(), none, absl::InfiniteDuration(), &log);
  loser.join();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
  EXPECT_EQ(end.exit_code, 1);
  EXPECT_TRUE(end.at_once);
  EXPECT_EQ(Health(channel_), "NOT_SERVING");
  ExpectFailure(idle.Finish(), grpc::StatusCode::UNAVAILABLE, {kCause});
  ExpectFailure(stuck.Finish(), grpc::StatusCode::UNAVAILABLE, {kCause});
  ExpectFailure(testkit::Run(channel_, AllMessages(idle_data)), grpc::StatusCode::UNAVAILABLE,
                {kCause});
  char line[512] = {};
  ASSERT_GT(read(log_pipe[0], line, sizeof(line) - 1), 0);
  EXPECT_THAT(line,
              ::testing::AllOf(::testing::HasSubstr("backend_lost"), ::testing::HasSubstr(kCause)));
  close(log_pipe[0]);
  close(log_pipe[1]);
  faults_->OpenAllGates();
  ExpectNothingHeld();
}

TEST_F(LostBackendTest, ASignalDrainsAWellOne) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigset_t before;
  pthread_sigmask(SIG_BLOCK, &signals, &before);
  const pthread_t self = pthread_self();
  std::thread sender([self] { pthread_kill(self, SIGTERM); });
  rpc::Log log(rpc::LogFormat::kText);
  const ServeEnd end = ServeUntilEnd(server_.get(), signals, absl::Seconds(5), &log);
  sender.join();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  EXPECT_EQ(end.exit_code, 0);
  EXPECT_FALSE(end.at_once);
}

}  // namespace
}  // namespace structkv::testkit
