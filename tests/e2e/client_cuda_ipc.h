// The client library with memory of a GPU, that of the fake CUDA runtime, and a real server that
// opens it or does not. What is held comes back.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <utility>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/e2e/client_gpu_test.h"
#include "tests/kernels/cuda/fake_backend.h"
#include "tests/testing/process.h"
#include "tests/testing/region_test.h"

namespace structkv::testkit {

class ClientCudaIpcTest : public ClientGpuTest<RegionTest> {
 protected:
  void SetUp() override { structkv::testing::FakeCuda::Reset({.count = 2}); }
  void TearDown() override {
    EXPECT_TRUE(Eventually([&] { return files_ == 0 || OpenFiles(getpid()) <= files_; }))
        << OpenFiles(getpid()) << " descriptors, there were " << files_;
    client_ = nullptr;
    if (running()) {
      EXPECT_TRUE(Eventually([&] { return structkv::testing::FakeCuda::held() == held_; }));
    }
    EXPECT_EQ(structkv::testing::FakeCuda::freed_while_open(), 0);
  }
  static void TearDownTestSuite() {
    EXPECT_EQ(structkv::testing::FakeCuda::held(), structkv::testing::FakeHeld());
  }

  // From here on descriptors count: at the end of the test there are no more of them.
  void CountFiles() { files_ = OpenFiles(getpid()); }

  void StartOnGpus(ServerOptions options) {
    StartAlone(std::move(options), structkv::testing::MakeFakeBackend());
    Connect();
  }
  void StartOnCpu(ServerOptions options) {
    StartAlone(std::move(options), *cpu::CreateCpuBackend());
    Connect();
  }

 private:
  int64_t files_ = 0;  // 0: they do not count
};

}  // namespace structkv::testkit
