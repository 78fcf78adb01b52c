// What the fake CUDA runtime is there for: it notices what works on a GPU by luck alone.
#include "tests/kernels/cuda/fake_runtime.h"

#include <cstddef>

#include "gtest/gtest.h"
#include "kernels/cuda/device_memory.h"

namespace structkv::testing {
namespace {

TEST(FakeCudaTest, CopiesRunLateAndTheHostCannotTouchDeviceMemory) {
  FakeCuda::Reset({});
  {
    auto device = cuda::MakeDeviceBytes(4096);
    auto pinned = cuda::MakePinnedBytes(4096);
    auto stream = cuda::MakeStream();
    ASSERT_TRUE(device.ok() && pinned.ok() && stream.ok());
    std::byte* const host = pinned->get();
    host[0] = std::byte{1};
    ASSERT_EQ(cudaMemcpyAsync(device->get(), host, 4096, cudaMemcpyHostToDevice, stream->get()),
              cudaSuccess);
    host[0] = std::byte{2};
    ASSERT_EQ(cudaMemcpyAsync(host, device->get(), 4096, cudaMemcpyDeviceToHost, stream->get()),
              cudaSuccess);
    host[0] = std::byte{3};
    ASSERT_EQ(cudaStreamSynchronize(stream->get()), cudaSuccess);
    EXPECT_EQ(host[0], std::byte{3});
    EXPECT_DEATH(device->get()[0] = std::byte{4}, "");
    std::byte pageable{};
    EXPECT_DEATH(
        (void)cudaMemcpyAsync(&pageable, device->get(), 1, cudaMemcpyDeviceToHost, stream->get()),
        "not pinned");
  }
  EXPECT_EQ(FakeCuda::held(), FakeHeld());
}

}  // namespace
}  // namespace structkv::testing
