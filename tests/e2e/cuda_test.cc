// The service on the CUDA backend, whose GPUs are those of the fake runtime.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/kernels/cuda/fake_backend.h"
#include "tests/kernels/cuda/gate.h"
#include "tests/testing/health.h"
#include "tests/testing/lost_backend.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using structkv::testing::FakeCuda;
using structkv::testing::FakeHeld;
using structkv::testing::FakeWork;
using structkv::testing::Gate;
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
    EXPECT_EQ(FakeCuda::registered_bytes(), 0);
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

// Prompts that are admitted wait for one another's layers, and none fails for want of device
// memory.
TEST_F(CudaServiceTest, ManyPromptsShareAPoolForOneLayer) {
  constexpr int64_t kPool = 64 << 10;
  constexpr uint32_t kTokens = 200;
  Stop();
  FakeCuda::Reset({});
  std::unique_ptr<Backend> backend = MakeFakeBackend(
      {.memory_bytes = kPool, .least_memory_bytes = 1, .lanes = 4, .slice_bytes = 4096});
  const Backend* const gpu = backend.get();
  StartAlone(TestOptions(), std::move(backend));
  std::atomic<int64_t> most{0};
  FakeCuda::SetHook([gpu, &most] {
    const int64_t used = gpu->stats().gpus[0].calls.used_bytes;
    for (int64_t before = most; before < used && !most.compare_exchange_weak(before, used);) {
    }
  });
  std::vector<std::thread> callers;
  for (uint32_t i = 0; i < 8; ++i) {
    callers.emplace_back([this, i] {
      const PromptData data(Open(kTokens), i);
      ExpectSuccess(data, Run(data));
    });
  }
  for (std::thread& caller : callers) caller.join();
  FakeCuda::SetHook(nullptr);
  EXPECT_GT(2 * most, kPool) << "there was room for two layers";
}

// The server receives keys and values where a GPU copies from by itself, and keys of the layer
// after the one that is computed are on their way already: each crosses the bus once, in the runs
// that it has, and not by way of the staging buffers.
TEST_F(CudaServiceTest, TheNextLayersKeysAreCopiedFromWhereTheyWereReceived) {
  constexpr uint32_t kTokens = 4800;  // a layer that the thread which reads leaves to others
  constexpr int64_t kRunBytes = int64_t{kTokens} * 32 * 2;  // a KV head's keys of a layer
  ASSERT_GT(kRunBytes, structkv::testing::kFakeSliceBytes);
  Stop();
  FakeCuda::Reset({});
  std::unique_ptr<Backend> backend = MakeFakeBackend();
  const Backend* const gpu = backend.get();
  StartAlone(TestOptions(), std::move(backend));
  const auto used = [gpu] { return gpu->stats().gpus[0].calls.used_bytes; };

  const PromptData data(Open(kTokens), 7);
  Gate gate;
  std::thread caller([&] { ExpectSuccess(data, Run(data)); });
  EXPECT_TRUE(gate.WaitUntilBlocked());
  // The call has the keys of its layer, two runs, and less than two runs of its own; two more are
  // the next layer's. Whichever of the copies and the call is stopped, the other one goes on.
  EXPECT_TRUE(Eventually([&] { return 2 * used() >= 9 * kRunBytes; }))
      << used() << ": nothing was staged while a layer was computed";
  EXPECT_GT(FakeCuda::registered_bytes(), 0);
  gate.Open();
  caller.join();

  std::set<cudaStream_t> computes;
  std::vector<FakeWork> runs;
  for (const FakeWork& work : FakeCuda::TakeLog()) {
    if (work.kind == FakeWork::Kind::kKernel) computes.insert(work.stream);
    if (work.kind == FakeWork::Kind::kToDevice && work.bytes >= kRunBytes) runs.push_back(work);
  }
  EXPECT_EQ(runs.size(), 2 * data.open().geometry().layer_count());
  EXPECT_GE(std::count_if(runs.begin(), runs.end(),
                          [&](const FakeWork& run) { return computes.count(run.stream) == 0; }),
            2);
}

// Where no memory can be pinned, the answers are the same.
TEST_F(CudaServiceTest, ServesWithoutPinnedMemory) {
  Stop();
  FakeCuda::Reset({});
  std::atomic<int> told{0};
  StartAlone(TestOptions(),
             MakeFakeBackend({.memory_bytes = int64_t{64} << 20,
                              .slice_bytes = structkv::testing::kFakeSliceBytes},
                             {.not_pinned = [&told](const absl::Status& /*why*/) { ++told; }}));
  FakeCuda::FailAllocation(0, cudaErrorMemoryAllocation);
  const PromptData data(Open(1200), 8);
  ExpectSuccess(data, Run(data));
  EXPECT_EQ(told, 1);
  EXPECT_EQ(FakeCuda::registered_bytes(), 0);
}

// A prompt of which no layer can ever be computed is refused before it sends one, for good.
TEST_F(CudaServiceTest, WhatTheGpuCanNeverHoldIsRefusedAtOpen) {
  Stop();
  FakeCuda::Reset({.count = 2});
  StartAlone(
      TestOptions(),
      MakeFakeBackend({.memory_bytes = 64 << 10, .least_memory_bytes = 1, .slice_bytes = 4096}));
  const Outcome refused = ServiceTest::Run({OpenMessage(Open(2000))});
  ExpectFailure(refused, grpc::StatusCode::RESOURCE_EXHAUSTED,
                {"one KV head of a layer needs ", "all that calls have of it is 61440"});
  EXPECT_THAT(refused.trailers,
              ::testing::Contains(::testing::Pair("grpc-retry-pushback-ms", "-1")));
  EXPECT_EQ(server().sessions().budget().reserved_bytes(), 0);
  const PromptData data(Open(200), 1);
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
