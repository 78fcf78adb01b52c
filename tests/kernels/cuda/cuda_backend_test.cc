// The CUDA backend's host side on the fake runtime: what the conformance suite does not ask about.
#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/devices.h"
#include "kernels/layer_pass.h"
#include "tests/kernels/cuda/cuda_backend_fixture.h"
#include "tests/kernels/cuda/gate.h"

namespace structkv {
namespace {

using ::testing::AllOf;
using testing::CudaBackendTest;
using ::testing::ElementsAre;
using testing::FakeCuda;
using testing::FakeGpus;
using testing::FakeHeld;
using testing::FakeWork;
using testing::Gate;
using ::testing::HasSubstr;
using testing::Inputs;
using testing::kMiB;
using testing::MakeFakeBackend;

TEST_F(CudaBackendTest, SaysWhatItHas) {
  Start({.count = 2});
  EXPECT_EQ(backend_->name(), "cuda");
  EXPECT_EQ(backend_->device(), "GPU 0: Fake GPU, 64 MiB; GPU 1: Fake GPU, 64 MiB");
  EXPECT_EQ(backend_->Health(), absl::OkStatus());
}

TEST_F(CudaBackendTest, NoDriverIsNoGpu) {
  FakeCuda::FailDeviceCount(cudaErrorInsufficientDriver);
  const absl::Status status = cuda::CreateCudaBackend({}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("no CUDA device"), HasSubstr("driver version is insufficient")));
  FakeCuda::Reset({.count = 0});
  EXPECT_EQ(cuda::CreateCudaBackend({}).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(CudaBackendTest, AnOldGpuIsNone) {
  FakeCuda::Reset({.major = 7});
  const absl::Status status = cuda::CreateCudaBackend({}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("compute capability 7.0, at least 8.0"));
}

TEST_F(CudaBackendTest, TakesItsMemoryOnce) {
  FakeCuda::Reset({.count = 2, .memory_bytes = 300 * kMiB});
  {
    const auto half = cuda::CreateCudaBackend({});
    ASSERT_TRUE(half.ok()) << half.status();
    EXPECT_EQ(FakeCuda::held().device_bytes, 300 * kMiB);
  }
  for (const int64_t bytes : {kMiB, 301 * kMiB}) {
    const absl::Status status = cuda::CreateCudaBackend({.device_memory_bytes = bytes}).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr("GPU 0"), HasSubstr(std::to_string(bytes)),
                      HasSubstr("must be in [67108864, 314572800]")));
  }
  Start({}, {.memory_bytes = 70 * kMiB, .slice_bytes = 4096});
  const FakeHeld held = FakeCuda::held();
  EXPECT_EQ(held.device_bytes, 70 * kMiB);
  ExpectWorks();
  const std::vector<float> scores = Scores(3000);
  EXPECT_EQ(Selected(scores), Wanted(scores));
  EXPECT_EQ(FakeCuda::held(), held);
}

TEST_F(CudaBackendTest, ReservesMemoryApartFromThatOfCalls) {
  FakeCuda::Reset({.count = 2});
  std::shared_ptr<std::byte> kept;
  {
    const auto backend =
        *cuda::CreateCudaBackend({.device_memory_bytes = 96 * kMiB, .reserve_bytes = 32 * kMiB});
    EXPECT_EQ(FakeCuda::held().device_bytes, 2 * 96 * kMiB);
    EXPECT_THAT(backend->gpus(), ElementsAre(0, 1));
    for (const int gpu : backend->gpus()) {
      EXPECT_EQ(backend->reservable_bytes(gpu), 32 * kMiB);
      auto all = backend->Reserve(gpu, 32 * kMiB);
      ASSERT_TRUE(all.ok()) << all.status();
      cuda::Place place;
      ASSERT_EQ(cuda::PlaceOf(all->get() + 32 * kMiB - 1, &place), cudaSuccess);
      EXPECT_EQ(place.device, gpu);
      const absl::Status taken = backend->Reserve(gpu, 1).status();
      EXPECT_EQ(taken.code(), absl::StatusCode::kResourceExhausted);
      EXPECT_THAT(std::string(taken.message()), HasSubstr("for 1 bytes; 0 of 33554432 are free"));
    }
    auto small = backend->Reserve(1, 100);
    ASSERT_TRUE(small.ok());
    const BackendStats stats = backend->stats();
    ASSERT_EQ(stats.gpus.size(), 2U);
    for (const BackendStats::Gpu& gpu : stats.gpus) {
      EXPECT_EQ(gpu.calls.bytes, 60 * kMiB);
      EXPECT_EQ(gpu.calls.used_bytes, 0);
      EXPECT_EQ(gpu.resident.bytes, 4 * kMiB);
      EXPECT_EQ(gpu.resident.used_bytes, 0);
      EXPECT_EQ(gpu.apart.bytes, 32 * kMiB);
      EXPECT_EQ(gpu.apart.used_bytes, gpu.index == 1 ? 256 : 0);
    }
    EXPECT_FALSE(backend->Reserve(1, 32 * kMiB).ok());
    EXPECT_TRUE(absl::IsFailedPrecondition(backend->Reserve(2, 1).status()));
    kept = *std::move(small);
  }
  // The memory outlives the backend.
  EXPECT_EQ(FakeCuda::held().device_bytes, 96 * kMiB);
  kept.reset();
  EXPECT_EQ(FakeCuda::held(), FakeHeld());
  const auto half =
      *cuda::CreateCudaBackend({.device_memory_bytes = 128 * kMiB, .reserve_bytes = 0});
  EXPECT_EQ(half->reservable_bytes(0), 64 * kMiB);
  const absl::Status none =
      cuda::CreateCudaBackend({.device_memory_bytes = 96 * kMiB, .reserve_bytes = 40 * kMiB})
          .status();
  EXPECT_THAT(std::string(none.message()), HasSubstr("41943040 of it are set apart"));
  const auto without = *cuda::CreateCudaBackend({.device_memory_bytes = 64 * kMiB});
  EXPECT_EQ(without->reservable_bytes(0), 0);
  EXPECT_FALSE(without->Reserve(0, 1).ok());
}

TEST_F(CudaBackendTest, AStartThatRunsOutOfMemoryLeavesNothing) {
  for (int64_t n = 0;; ++n) {
    FakeCuda::Reset({.count = 2});
    FakeCuda::FailAllocation(n, cudaErrorMemoryAllocation);
    const auto backend = cuda::CreateCudaBackend({.device_memory_bytes = 64 * kMiB});
    if (backend.ok()) {
      EXPECT_EQ(n, 2 * (1 + 2 * cuda::DeviceOptions().lanes));
      break;
    }
    EXPECT_EQ(backend.status().code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(backend.status().message()),
                AllOf(HasSubstr("GPU"), HasSubstr("bytes: out of memory")));
    EXPECT_EQ(FakeCuda::held(), FakeHeld());
  }
}

TEST_F(CudaBackendTest, OutOfMemoryAtALaunchIsThatCallsAlone) {
  int told = 0;
  Start({}, {.memory_bytes = 64 * kMiB, .slice_bytes = 4096}, [&](const absl::Status& why) {
    ++told;
    EXPECT_EQ(why.code(), absl::StatusCode::kResourceExhausted);
  });
  const int64_t counted = backend_->stats().errors["cudaErrorMemoryAllocation"];
  FakeCuda::FailLaunch(0, cudaErrorMemoryAllocation);
  const absl::Status status = Saliency();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("GPU 0: LaunchSaliency: out of memory"));
  EXPECT_EQ(backend_->stats().errors["cudaErrorMemoryAllocation"], counted + 1);
  ExpectWorks();
  // What has no status is done by the CPU, and told once.
  const std::vector<float> scores = Scores(3000);
  for (int i = 0; i < 2; ++i) {
    FakeCuda::FailLaunch(0, cudaErrorMemoryAllocation);
    EXPECT_EQ(Selected(scores), Wanted(scores));
    FakeCuda::FailLaunch(0, cudaErrorMemoryAllocation);
    EXPECT_FALSE(backend_->FindBad(scores.data(), 1, 3000, SerialFor).has_value());
    FakeCuda::FailLaunch(1, cudaErrorMemoryAllocation);
    EXPECT_NEAR(backend_->Sums(scores.data(), 3000, 10, SerialFor).total,
                reference_->Sums(scores.data(), 3000, 10, SerialFor).total, 1e-9);
    std::vector<float> sum = Scores(3000);
    std::vector<float> wanted = sum;
    FakeCuda::FailLaunch(0, cudaErrorMemoryAllocation);
    backend_->Accumulate(0.5F, scores.data(), sum.data(), 3000, SerialFor);
    reference_->Accumulate(0.5F, scores.data(), wanted.data(), 3000, SerialFor);
    EXPECT_THAT(sum, ::testing::Pointwise(::testing::FloatEq(), wanted));
  }
  EXPECT_EQ(told, 1);
  EXPECT_EQ(Selected(scores), Wanted(scores));
  EXPECT_EQ(backend_->Health(), absl::OkStatus());
}

// Heads go in groups where a GPU has no room for all, or the kernels for so many.
TEST_F(CudaBackendTest, HeadsThatDoNotFitGoOneAfterTheOther) {
  const testing::Shape shape = {14, 7, 90, 32, 4};
  const Inputs some(shape, DType::kF32, Layout::kTokenHeadDim, random_);
  Start();
  std::vector<float> together;
  ASSERT_EQ(SaliencyOf(some.params(), &together), absl::OkStatus());
  backend_.reset();
  Start({}, {.memory_bytes = 128 << 10,
             .least_memory_bytes = 1,
             .resident_share = 0,
             .slice_bytes = 4096});
  std::vector<float> apart;
  ASSERT_EQ(SaliencyOf(some.params(), &apart), absl::OkStatus());
  EXPECT_GT(FakeCuda::kernels(0), 1);
  EXPECT_EQ(together, apart);
}

TEST_F(CudaBackendTest, MoreHeadsThanTheKernelsTake) {
  const testing::Shape shape = {130, 130, 20, 32, 2};
  Inputs many(shape, DType::kBF16, Layout::kHeadTokenDim, random_);
  Start();
  std::vector<float> out;
  ASSERT_EQ(SaliencyOf(many.params(), &out), absl::OkStatus());
  testing::ExpectNear(out, testing::Expected(many.params()), many.params(), /*half=*/true);
  // The lowest token of all groups, of its heads the lowest; a query before any score.
  const float nan = std::numeric_limits<float>::quiet_NaN();
  many.keys.Set(3, 9, 1, nan);
  many.keys.Set(129, 8, 1, nan);
  BadStatistic bad;
  EXPECT_EQ(backend_->Saliency(many.params(), out.data(), &bad, SerialFor).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(bad.head, 129);
  EXPECT_EQ(bad.token, 8);
  many.queries.Set(128, 1, 5, nan);
  const absl::Status status = backend_->Saliency(many.params(), out.data(), &bad, SerialFor);
  EXPECT_THAT(std::string(status.message()), HasSubstr("queries: query head 128, window row 1"));
  EXPECT_EQ(bad.head, 128);
}

TEST_F(CudaBackendTest, WhatCanNeverFitIsRefusedOrDoneByTheCpu) {
  int told = 0;
  Start({},
        {.memory_bytes = 4096, .least_memory_bytes = 1, .resident_share = 0, .slice_bytes = 4096},
        [&](const absl::Status& /*why*/) { ++told; });
  const absl::Status status = Saliency();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("GPU 0: device memory for "), HasSubstr("all of it is 4096")));
  const std::vector<float> scores = Scores(3000);
  EXPECT_EQ(Selected(scores), Wanted(scores));
  EXPECT_EQ(told, 1);
  EXPECT_EQ(backend_->Health(), absl::OkStatus());
}

// What CheckRoom lets through has room: the least pool that it accepts computes, one block less
// does not.
TEST_F(CudaBackendTest, SaysBeforehandWhatCanNeverFit) {
  int64_t least = 0;
  for (int64_t bytes = 4096; least == 0; bytes += 256) {
    backend_.reset();
    Start(
        {},
        {.memory_bytes = bytes, .least_memory_bytes = 1, .resident_share = 0, .slice_bytes = 4096});
    const absl::Status room = backend_->CheckRoom(inputs_.params(), /*keys_on_device=*/false);
    if (room.ok()) {
      least = bytes;
      ExpectWorks();
      break;
    }
    EXPECT_EQ(room.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(room.message()),
                AllOf(HasSubstr("one KV head of a layer needs "),
                      HasSubstr("all that calls have of it is " + std::to_string(bytes))));
    EXPECT_EQ(Saliency().code(), absl::StatusCode::kResourceExhausted);
    ASSERT_LT(bytes, kMiB);
  }
  EXPECT_GT(least, 4096);
  backend_.reset();
  // Keys that lie in a GPU's memory are not copied there.
  Start({}, {.memory_bytes = least - 256,
             .least_memory_bytes = 1,
             .resident_share = 0,
             .slice_bytes = 4096});
  EXPECT_EQ(backend_->CheckRoom(inputs_.params(), /*keys_on_device=*/true), absl::OkStatus());
  SaliencyParams given = inputs_.params();
  const std::vector<float> lse(static_cast<size_t>(given.queries.heads * given.queries.tokens));
  given.lse = lse.data();
  EXPECT_EQ(backend_->CheckRoom(given, /*keys_on_device=*/false), absl::OkStatus())
      << "with the log-sum-exp no exponentials are stored";
}

// Whichever call it is that meets a sticky error, that is the end, and nothing crashes or leaks.
TEST_F(CudaBackendTest, AStickyErrorIsTheEnd) {
  const std::vector<float> scores = Scores(3000);
  Start();
  const int64_t before = FakeCuda::calls();
  ASSERT_EQ(Saliency(), absl::OkStatus());
  const int64_t saliency_calls = FakeCuda::calls() - before;
  ASSERT_EQ(Selected(scores), Wanted(scores));
  const int64_t all_calls = FakeCuda::calls() - before;
  backend_.reset();
  for (int64_t n = 0; n < all_calls; ++n) {
    SCOPED_TRACE(n);
    Start();
    FakeCuda::FailCall(n, cudaErrorIllegalAddress);
    const absl::Status status = Saliency();
    (void)Selected(scores);
    // The last call of a lease is its own, after the result is there.
    if (n < saliency_calls - 1) {
      EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
    }
    const absl::Status health = backend_->Health();
    EXPECT_EQ(health.code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(health.message()),
                AllOf(HasSubstr("GPU 0: "), HasSubstr("an illegal memory access"),
                      HasSubstr("cudaErrorIllegalAddress")));
    // Nothing is asked of the GPU any more.
    const int64_t calls = FakeCuda::calls();
    EXPECT_EQ(Saliency().code(), absl::StatusCode::kUnavailable);
    (void)Selected(scores);
    std::vector<float> sum = scores;
    backend_->Accumulate(0.5F, scores.data(), sum.data(), 3000, SerialFor);
    EXPECT_EQ(FakeCuda::calls(), calls);
    backend_.reset();
    EXPECT_EQ(FakeCuda::held(), FakeHeld());
  }
}

TEST_F(CudaBackendTest, SeveralThreadsShareTheLanes) {
  Start({.count = 2}, {.memory_bytes = 64 * kMiB, .lanes = 2, .slice_bytes = 1000});
  std::vector<float> expected;
  ASSERT_EQ(Saliency(&expected), absl::OkStatus());
  const std::vector<float> scores = Scores(1500);
  const std::vector<int32_t> wanted = Wanted(scores);
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 4; ++k) {
        std::vector<float> out;
        EXPECT_EQ(Saliency(&out), absl::OkStatus());
        EXPECT_EQ(out, expected);
        EXPECT_EQ(Selected(scores), wanted);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(FakeCuda::kernels(0), 0);
  EXPECT_GT(FakeCuda::kernels(1), 0);
}

TEST_F(CudaBackendTest, OneCallRunsWhileAnotherDoes) {
  Start();
  Gate gate;
  std::thread first([&] { EXPECT_EQ(Saliency(), absl::OkStatus()); });
  ASSERT_TRUE(gate.WaitUntilBlocked());
  ExpectWorks();
  gate.Open();
  first.join();
}

TEST_F(CudaBackendTest, CallsGoWhereMostMemoryIsFree) {
  Start({.count = 3});
  Gate gate;
  std::thread first([&] { EXPECT_EQ(Saliency(), absl::OkStatus()); });
  ASSERT_TRUE(gate.WaitUntilBlocked());
  EXPECT_EQ(FakeCuda::kernels(0), 0);
  ExpectWorks();
  EXPECT_EQ(FakeCuda::kernels(1), 1);
  gate.Open();
  first.join();
  EXPECT_EQ(FakeCuda::kernels(0), 1);
  EXPECT_EQ(FakeCuda::kernels(2), 0);
}

// In long runs, wherever these lie; what goes to pageable memory is staged in slices.
TEST_F(CudaBackendTest, RowsGoToPinnedMemoryByThemselves) {
  Start();
  constexpr int64_t kKeep = 384;  // 96 KiB, and 48 for each head
  const testing::Shape shape = {4, 2, 2048, 64, 4};
  const int64_t row_bytes = shape.dim * 2;
  const int64_t bytes = shape.kv_heads * kKeep * row_bytes;
  const Inputs inputs(shape, DType::kBF16, Layout::kHeadTokenDim, random_);
  std::vector<std::byte> pageable(2 * bytes);
  const cuda::PinnedBytes pinned = *cuda::MakePinnedBytes(4 * bytes);
  // Bytes that went to the host in copies that are longer than a slice.
  const auto run = [&](std::byte* to, int64_t apart) {
    std::vector<float> sum(shape.tokens);
    std::vector<int32_t> positions(kKeep);
    SaliencySums sums;
    const auto room = [&](std::byte* at) {
      MutableTensorView view = MutableTensorView::Dense(at, DType::kBF16, Layout::kHeadTokenDim,
                                                        shape.kv_heads, kKeep, shape.dim);
      view.head_stride *= apart;
      return view;
    };
    const TensorView& keys = inputs.params().keys;
    const LayerPass pass = {.saliency = inputs.params(),
                            .top_count = 60,
                            .window = shape.window,
                            .keep = kKeep,
                            .rows = {{.source = keys, .destination = room(to)},
                                     {.source = keys, .destination = room(to + apart * bytes)}},
                            .sum = sum.data(),
                            .positions = positions.data(),
                            .sums = &sums};
    FakeCuda::TakeLog();
    EXPECT_EQ(backend_->RunLayer(pass, nullptr, SerialFor), absl::OkStatus());
    for (int64_t i = 0; i < 2 * shape.kv_heads * kKeep; ++i) {
      const int64_t head = i / kKeep, tensor = head / shape.kv_heads;
      const std::byte* const got = to + tensor * apart * bytes +
                                   head % shape.kv_heads * apart * kKeep * row_bytes +
                                   i % kKeep * row_bytes;
      EXPECT_EQ(std::memcmp(got, keys.Row(head % shape.kv_heads, positions[i % kKeep]), row_bytes),
                0)
          << i;
    }
    const std::vector<FakeWork> log = FakeCuda::TakeLog();
    int64_t direct = 0;
    for (const FakeWork& work : log) {
      if (work.kind == FakeWork::Kind::kFromDevice && work.bytes > 4096) direct += work.bytes;
    }
    return direct;
  };
  EXPECT_EQ(run(pinned.get(), 1), 2 * bytes);
  EXPECT_EQ(run(pinned.get(), 2), 0) << "heads lie apart, in short runs";
  EXPECT_EQ(run(pageable.data(), 1), 0);
}

// Tensors in a GPU's memory are computed with there, and by nobody else.
class DeviceMemoryTest : public CudaBackendTest {
 protected:
  // Rows of float16, of which the first kept ones of each head are gathered.
  static constexpr int64_t kHeads = 2, kTokens = 10, kDim = 32, kKept = 4;
  static constexpr int64_t kBytes = kHeads * kTokens * kDim * 2;

  static cuda::DeviceBytes On(int device) {
    EXPECT_EQ(cudaSetDevice(device), cudaSuccess);
    return *cuda::MakeDeviceBytes(kBytes);
  }
  absl::Status Gather(const void* from, void* to) const {
    const int32_t positions[kKept] = {0, 3, 4, 9};
    return backend_->Gather(
        TensorView::Dense(from, DType::kF16, Layout::kHeadTokenDim, kHeads, kTokens, kDim),
        positions, /*per_head=*/false,
        MutableTensorView::Dense(to, DType::kF16, Layout::kHeadTokenDim, kHeads, kKept, kDim),
        SerialFor);
  }
};

TEST_F(DeviceMemoryTest, CallsGoWhereTheTensorsLie) {
  Start({.count = 3});
  const cuda::DeviceBytes keys = On(2);
  SaliencyParams params = inputs_.params();
  params.keys = TensorView::Dense(keys.get(), DType::kBF16, Layout::kTokenHeadDim, 2, 10, 32);
  params.queries.tokens = 4;
  EXPECT_EQ(SaliencyOf(params), absl::OkStatus());
  EXPECT_EQ(FakeCuda::kernels(2), 1);
  std::vector<std::byte> rows(kBytes);
  EXPECT_EQ(Gather(keys.get(), rows.data()), absl::OkStatus());
  EXPECT_EQ(Gather(rows.data(), keys.get()), absl::OkStatus());
  EXPECT_EQ(backend_->Zero(keys.get(), kBytes), absl::OkStatus());
  EXPECT_EQ(FakeCuda::kernels(2), 3);
  EXPECT_EQ(FakeCuda::kernels(0) + FakeCuda::kernels(1), 0);
}

TEST_F(DeviceMemoryTest, IsFilledFromTheHost) {
  Start({.count = 2});
  constexpr int64_t kMany = (int64_t{9} << 20) + 100;  // more than two slices
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  const cuda::DeviceBytes to = *cuda::MakeDeviceBytes(kMany);
  int64_t filled = 0;
  const auto fill = [&filled](int64_t offset, absl::Span<std::byte> run) {
    EXPECT_EQ(offset, filled);
    for (std::byte& byte : run) byte = static_cast<std::byte>(filled++ % 251);
  };
  ASSERT_EQ(backend_->Fill(to.get(), kMany, fill), absl::OkStatus());
  EXPECT_EQ(filled, kMany);
  const cuda::PinnedBytes bytes = *cuda::MakePinnedBytes(kMany);
  const auto stream = cuda::MakeStream();
  ASSERT_EQ(cudaMemcpyAsync(bytes.get(), to.get(), kMany, cudaMemcpyDefault, stream->get()),
            cudaSuccess);
  ASSERT_EQ(cudaStreamSynchronize(stream->get()), cudaSuccess);
  for (int64_t i = 0; i < kMany; ++i) {
    ASSERT_EQ(bytes.get()[i], static_cast<std::byte>(i % 251)) << i;
  }
  filled = 0;
  std::vector<std::byte> host(100);
  ASSERT_EQ(backend_->Fill(host.data(), 100, fill), absl::OkStatus());
  EXPECT_EQ(host[99], std::byte{99});
  EXPECT_EQ(backend_->Fill(to.get(), 0, fill), absl::OkStatus());
}

TEST_F(DeviceMemoryTest, BothSidesOfAGatherAreOfOneGpu) {
  Start({.count = 2});
  const cuda::DeviceBytes from = On(0);
  const cuda::DeviceBytes to = On(1);
  const absl::Status status = Gather(from.get(), to.get());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("GPU 0"), HasSubstr("GPU 1")));
}

// The CPU cannot help, so the call fails, and it alone.
TEST_F(DeviceMemoryTest, NothingFallsBackToTheCpu) {
  Start();
  const cuda::DeviceBytes from = On(0);
  const cuda::DeviceBytes to = On(0);
  std::vector<std::byte> rows(kBytes);
  for (int64_t n = 0;; ++n) {
    const int64_t before = FakeCuda::calls();
    FakeCuda::FailCall(n, cudaErrorMemoryAllocation);
    const absl::Status status = Gather(from.get(), to.get());
    FakeCuda::FailCall(-1, cudaSuccess);
    // The last call of a lease is its own, after the result is there.
    if (FakeCuda::calls() - before <= n + 1) break;
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << n;
    ASSERT_LT(n, 100);
  }
  EXPECT_EQ(Gather(from.get(), to.get()), absl::OkStatus());
  FakeCuda::FailLaunch(0, cudaErrorMemoryAllocation);
  EXPECT_EQ(Gather(rows.data(), to.get()).code(), absl::StatusCode::kResourceExhausted);
  FakeCuda::FailLaunch(0, cudaErrorMemoryAllocation);
  EXPECT_EQ(Gather(from.get(), rows.data()).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(backend_->Health(), absl::OkStatus());
}

TEST_F(CudaBackendTest, AWaitHasAnEnd) {
  Start({}, {.memory_bytes = 64 * kMiB,
             .lanes = 1,
             .slice_bytes = 4096,
             .wait_limit = std::chrono::milliseconds(20)});
  {
    Gate gate;
    std::thread first([&] { EXPECT_EQ(Saliency(), absl::OkStatus()); });
    ASSERT_TRUE(gate.WaitUntilBlocked());
    const absl::Status status = Saliency();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(status.message()), HasSubstr("within 20 ms"));
    gate.Open();
    first.join();
  }
  ExpectWorks();
}

// However many calls there are: a pool with room for one of them has each wait for those before it,
// for longer together than any may wait while nothing moves.
TEST_F(CudaBackendTest, ManyCallsOnAPoolForOneAllHaveTheirTurn) {
  constexpr int kCalls = 16;
  constexpr auto kCallTime = std::chrono::milliseconds(100);
  const cuda::DeviceOptions options = {.memory_bytes = 48 << 10,
                                       .least_memory_bytes = 1,
                                       .resident_share = 0,
                                       .lanes = 4,
                                       .slice_bytes = 4096,
                                       .wait_limit = kCalls * kCallTime / 2};
  Start({}, options);
  std::atomic<int64_t> most{0};
  FakeCuda::SetHook([&] {
    const int64_t used = backend_->stats().gpus[0].calls.used_bytes;
    for (int64_t before = most; before < used && !most.compare_exchange_weak(before, used);) {
    }
    // The first piece of each call's work takes its time.
    static thread_local bool slept = false;
    if (!std::exchange(slept, true)) std::this_thread::sleep_for(kCallTime);
  });
  const auto begun = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (int i = 0; i < kCalls; ++i) {
    threads.emplace_back([&] {
      std::vector<float> out;
      EXPECT_EQ(Saliency(&out), absl::OkStatus());
      testing::ExpectNear(out, testing::Expected(inputs_.params()), inputs_.params(),
                          /*half=*/true);
    });
  }
  for (std::thread& thread : threads) thread.join();
  FakeCuda::SetHook(nullptr);
  EXPECT_GT(2 * most, options.memory_bytes) << "two calls had room at a time";
  EXPECT_GT(std::chrono::steady_clock::now() - begun, options.wait_limit);
  EXPECT_EQ(FakeCuda::kernels(0), kCalls);
}

TEST_F(CudaBackendTest, WhoWaitsIsToldOfTheEnd) {
  Start({}, {.memory_bytes = 64 * kMiB,
             .lanes = 1,
             .slice_bytes = 4096,
             .wait_limit = std::chrono::minutes(10)});
  Gate gate;
  std::thread first([&] { EXPECT_EQ(Saliency().code(), absl::StatusCode::kUnavailable); });
  ASSERT_TRUE(gate.WaitUntilBlocked());
  std::thread second([&] { EXPECT_EQ(Saliency().code(), absl::StatusCode::kUnavailable); });
  FakeCuda::FailCall(0, cudaErrorIllegalAddress);
  gate.Open();
  first.join();
  second.join();
}

}  // namespace
}  // namespace structkv
