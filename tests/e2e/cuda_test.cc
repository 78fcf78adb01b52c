// The service on the CUDA backend, whose GPUs are those of the fake runtime.
#include <unistd.h>

#include <csignal>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/serve_loop.h"
#include "tests/kernels/cuda/fake_backend.h"
#include "tests/testing/health.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using structkv::testing::FakeCuda;
using structkv::testing::FakeHeld;
using structkv::testing::MakeFakeBackend;
using ::testing::HasSubstr;

class CudaServiceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    FakeCuda::Reset({.count = 2});
    absl::StatusOr<std::unique_ptr<Server>> server =
        Server::Start(TestOptions(), MakeFakeBackend());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    channel_ = NewChannel("127.0.0.1:" + std::to_string(server_->port()));
  }
  void TearDown() override {
    EXPECT_TRUE(Eventually([&] {
      const session::SessionManager& sessions = server_->sessions();
      return sessions.budget().reserved_bytes() == 0 && sessions.active_sessions() == 0 &&
             server_->active_streams() == 0;
    }));
    server_.reset();
    EXPECT_EQ(FakeCuda::held(), FakeHeld());
  }

  Outcome Run(const PromptData& data) const { return testkit::Run(channel_, AllMessages(data)); }

  // With the caller's log-sum-exp, so that the answer is as near to the oracle's as a CPU's.
  static v1::Open Open(uint32_t tokens) {
    v1::Open open = SmallOpen(tokens);
    open.set_window_lse(true);
    return open;
  }

  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST_F(CudaServiceTest, PromptsAreAnsweredAsTheOracleDoes) {
  std::vector<std::thread> callers;
  for (uint32_t i = 0; i < 3; ++i) {
    callers.emplace_back([this, i] {
      const PromptData data(Open(100 + 10 * i), i);
      const Outcome outcome = Run(data);
      ExpectSuccess(data, outcome);
      EXPECT_EQ(Assemble(outcome).opened.value_or(v1::Opened()).backend(), "cuda");
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_GT(FakeCuda::kernels(0), 0);
}

TEST_F(CudaServiceTest, AfterOutOfMemoryItServesOn) {
  const PromptData data(Open(100), 1);
  FakeCuda::FailLaunch(0, cudaErrorMemoryAllocation);
  ExpectFailure(Run(data), grpc::StatusCode::RESOURCE_EXHAUSTED, {"GPU", "out of memory"});
  EXPECT_EQ(Health(channel_), "SERVING");
  ExpectSuccess(data, Run(data));
}

TEST_F(CudaServiceTest, AfterAStickyErrorTheProcessIsToEnd) {
  const PromptData idle_data(Open(100), 1);
  Call idle(channel_);
  idle.Send(OpenMessage(idle_data.open()));
  idle.WaitForOpened();
  EXPECT_EQ(Health(channel_), "SERVING");

  int log_pipe[2];
  ASSERT_EQ(pipe(log_pipe), 0);
  rpc::Log log(rpc::LogFormat::kText, log_pipe[1]);
  sigset_t none;
  sigemptyset(&none);
  const PromptData data(Open(120), 2);
  FakeCuda::FailCall(10, cudaErrorIllegalAddress);
  const absl::Time begin = absl::Now();
  std::thread caller([&] {
    ExpectFailure(Run(data), grpc::StatusCode::UNAVAILABLE, {"an illegal memory access"});
  });
  const ServeEnd end = ServeUntilEnd(server_.get(), none, absl::InfiniteDuration(), &log);
  caller.join();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
  EXPECT_EQ(end.exit_code, 1);
  EXPECT_TRUE(end.at_once);
  EXPECT_EQ(Health(channel_), "NOT_SERVING");
  ExpectFailure(idle.Finish(), grpc::StatusCode::UNAVAILABLE, {"an illegal memory access"});
  char line[512] = {};
  ASSERT_GT(read(log_pipe[0], line, sizeof(line) - 1), 0);
  EXPECT_THAT(line, ::testing::AllOf(HasSubstr("backend_lost"), HasSubstr("GPU ")));
  close(log_pipe[0]);
  close(log_pipe[1]);
}

}  // namespace
}  // namespace structkv::testkit
