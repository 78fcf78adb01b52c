// Host memory that the CUDA backend pins, on the fake runtime.
#include "kernels/host_pinning.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/device_memory.h"
#include "service/engine/buffer_pool.h"
#include "tests/kernels/cuda/fake_backend.h"

namespace structkv {
namespace {

using engine::Buffer;
using engine::BufferPool;
using ::testing::AllOf;
using testing::FakeCuda;
using testing::FakeHeld;
using ::testing::HasSubstr;
using testing::MakeFakeBackend;

constexpr int64_t kMiB = int64_t{1} << 20;
const cuda::DeviceOptions kOptions = {.memory_bytes = 64 * kMiB, .slice_bytes = 4096};

class HostPinningTest : public ::testing::Test {
 protected:
  void SetUp() override { FakeCuda::Reset({}); }
  void TearDown() override {
    EXPECT_EQ(FakeCuda::held(), FakeHeld());
    EXPECT_EQ(FakeCuda::registered_bytes(), 0);
  }
};

TEST_F(HostPinningTest, APoolsMemoryIsTheDevicesToReadUntilItGoesBack) {
  Buffer kept;
  {
    const auto backend = MakeFakeBackend(kOptions);
    BufferPool pool(4 * kMiB, backend->host_pinning());
    Buffer received = pool.AcquirePinned(kMiB + 5);
    EXPECT_TRUE(cuda::IsPinned(received.data(), kMiB + 5));
    EXPECT_EQ(FakeCuda::registered_bytes(), static_cast<int64_t>(pool.pinned_bytes()));
    EXPECT_GT(FakeCuda::registered_bytes(), kMiB);
    const Buffer other = pool.Acquire(kMiB);
    EXPECT_FALSE(cuda::IsPinned(other.data(), kMiB));
    const Buffer small = pool.AcquirePinned(4096);
    EXPECT_FALSE(cuda::IsPinned(small.data(), 4096)) << "copied faster than it is queued";
    kept = pool.AcquirePinned(2 * kMiB);
    received.Reset();
    EXPECT_GT(FakeCuda::registered_bytes(), 3 * kMiB) << "kept for the next one";
  }
  // Buffers may outlive the backend.
  EXPECT_GE(FakeCuda::registered_bytes(), 2 * kMiB);
  kept.Reset();
}

TEST_F(HostPinningTest, WhereItFailsMemoryStaysPageableAndTheOperatorIsTold) {
  int told = 0;
  const auto backend = MakeFakeBackend(
      kOptions, {.not_pinned = [&](const absl::Status& why) {
        ++told;
        EXPECT_EQ(why.code(), absl::StatusCode::kResourceExhausted);
        EXPECT_THAT(
            std::string(why.message()),
            AllOf(HasSubstr("cudaHostRegister of 1048576 bytes"), HasSubstr("out of memory")));
      }});
  BufferPool pool(0, backend->host_pinning());
  const Buffer before = pool.AcquirePinned(kMiB);
  FakeCuda::FailAllocation(0, cudaErrorMemoryAllocation);
  for (int i = 0; i < 2; ++i) {
    const Buffer buffer = pool.AcquirePinned(kMiB);
    EXPECT_FALSE(cuda::IsPinned(buffer.data(), kMiB));
    buffer.data()[kMiB - 1] = std::byte{1};
  }
  EXPECT_EQ(told, 1);
  EXPECT_TRUE(cuda::IsPinned(before.data(), kMiB));
  EXPECT_EQ(pool.pinned_bytes(), static_cast<size_t>(kMiB));
  EXPECT_EQ(backend->Health(), absl::OkStatus());
}

TEST_F(HostPinningTest, ALostBackendPinsNothing) {
  int told = 0;
  const auto backend =
      MakeFakeBackend(kOptions, {.not_pinned = [&](const absl::Status& /*why*/) { ++told; }});
  BufferPool pool(0, backend->host_pinning());
  {
    const Buffer buffer = pool.AcquirePinned(kMiB);
    FakeCuda::FailCall(0, cudaErrorIllegalAddress);
    const Buffer after = pool.AcquirePinned(kMiB);
    after.data()[0] = std::byte{1};
  }
  EXPECT_EQ(told, 1);
  EXPECT_EQ(pool.pinned_bytes(), 0U);
}

}  // namespace
}  // namespace structkv
