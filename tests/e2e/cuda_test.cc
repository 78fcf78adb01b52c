// The service on the CUDA backend, whose GPUs are those of the fake runtime.
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/cuda/fake_backend.h"
#include "tests/testing/health.h"
#include "tests/testing/lost_backend.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using structkv::testing::FakeCuda;
using structkv::testing::FakeHeld;
using structkv::testing::MakeFakeBackend;
class CudaServiceTest : public ServiceTest {
 protected:
  void SetUp() override {
    FakeCuda::Reset({.count = 2});
    StartAlone(TestOptions(), MakeFakeBackend());
  }
  void TearDown() override {
    Stop();
    EXPECT_EQ(FakeCuda::held(), FakeHeld());
  }

  Outcome Run(const PromptData& data) { return ServiceTest::Run(AllMessages(data)); }

  // With the caller's log-sum-exp, so that the answer is as near to the oracle's as a CPU's.
  static v1::Open Open(uint32_t tokens) {
    v1::Open open = SmallOpen(tokens);
    open.set_window_lse(true);
    return open;
  }
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
  EXPECT_EQ(Health(channel()), "SERVING");
  ExpectSuccess(data, Run(data));
}

TEST_F(CudaServiceTest, AfterAStickyErrorTheProcessIsToEnd) {
  const PromptData idle_data(Open(100), 1);
  Call idle(channel());
  idle.Send(OpenMessage(idle_data.open()));
  idle.WaitForOpened();
  EXPECT_EQ(Health(channel()), "SERVING");
  const PromptData data(Open(120), 2);
  FakeCuda::FailCall(10, cudaErrorIllegalAddress);
  const auto lose = [&] {
    ExpectFailure(Run(data), grpc::StatusCode::UNAVAILABLE, {"an illegal memory access"});
  };
  ExpectEndsAsLost(&server(), lose, "GPU ");
  EXPECT_EQ(Health(channel()), "NOT_SERVING");
  ExpectFailure(idle.Finish(), grpc::StatusCode::UNAVAILABLE, {"an illegal memory access"});
}

}  // namespace
}  // namespace structkv::testkit
