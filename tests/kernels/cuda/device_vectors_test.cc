// Vectors of a prompt on a GPU of the fake runtime, and what calls leave there.
#include "kernels/cuda/device_vectors.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/layer_pass.h"
#include "tests/kernels/cuda/cuda_backend_fixture.h"

namespace structkv {
namespace {

using testing::FakeCuda;
using testing::FakeWork;
using testing::kMiB;

class DeviceVectorsTest : public testing::CudaBackendTest {
 protected:
  static constexpr int64_t kTokens = 3000;

  std::unique_ptr<ResidentVectors> Make(int64_t count, const void* keys = nullptr) {
    return backend_->Resident(count, kTokens, keys, nullptr);
  }
  BackendStats::Pool Pool(size_t gpu = 0) const { return backend_->stats().gpus[gpu].resident; }
};

TEST_F(DeviceVectorsTest, DoWhatTheHostsDo) {
  Start();
  const std::unique_ptr<ResidentVectors> vectors = Make(3);
  ASSERT_EQ(vectors->gpu(), 0);
  const std::unique_ptr<ResidentVectors> host = HostVectors(3, kTokens, *reference_);
  EXPECT_EQ(host->gpu(), -1);
  const std::vector<float> first = Scores(kTokens);
  const std::vector<float> second = Scores(kTokens);
  for (ResidentVectors* each : {vectors.get(), host.get()}) {
    ASSERT_EQ(each->Add({0, std::nullopt}, first.data(), SerialFor), absl::OkStatus());
    ASSERT_EQ(each->Add({2, std::nullopt}, second.data(), SerialFor), absl::OkStatus());
    ASSERT_EQ(each->Add({0, 0.9F}, second.data(), SerialFor), absl::OkStatus());
    ASSERT_EQ(each->Fold(0, 0.5F, {2, 2}, SerialFor), absl::OkStatus());
    each->Drop(2);
  }
  std::vector<float> got(kTokens);
  std::vector<float> wanted(kTokens);
  ASSERT_EQ(vectors->Read(0, got.data()), absl::OkStatus());
  ASSERT_EQ(host->Read(0, wanted.data()), absl::OkStatus());
  EXPECT_THAT(got, ::testing::Pointwise(::testing::FloatEq(), wanted));
  std::vector<int32_t> positions(20, -1);
  ASSERT_EQ(vectors->Select(0, {.tokens = kTokens, .window = 5, .keep = 20}, positions.data()),
            absl::OkStatus());
  EXPECT_EQ(positions, Wanted(got));
}

TEST_F(DeviceVectorsTest, LieOnTheGpuOfTheKeysOrOnTheOneWithRoom) {
  Start({.count = 2});
  EXPECT_EQ(Make(1)->gpu(), 0);
  const std::unique_ptr<ResidentVectors> first = Make(1);
  EXPECT_EQ(first->gpu(), 0);
  const std::unique_ptr<ResidentVectors> second = Make(1);
  EXPECT_EQ(second->gpu(), 1) << "the other one has more room";
  for (const int gpu : {0, 1}) {
    ASSERT_EQ(cudaSetDevice(gpu), cudaSuccess);
    const cuda::DeviceBytes keys = *cuda::MakeDeviceBytes(4096);
    EXPECT_EQ(Make(1, keys.get())->gpu(), gpu);
  }
}

TEST_F(DeviceVectorsTest, GoToTheHostWhereThereIsNoRoom) {
  Start();
  EXPECT_EQ(Pool().bytes, 4 * kMiB);
  constexpr int64_t kAll = 4 * kMiB / (3008 * 4);
  {
    const std::unique_ptr<ResidentVectors> most = Make(kAll * 3 / 4);
    EXPECT_EQ(most->gpu(), 0);
    EXPECT_GT(Pool().used_bytes, 2 * kMiB);
    const std::unique_ptr<ResidentVectors> more = Make(kAll / 2);
    EXPECT_EQ(more->gpu(), -1);
    const std::vector<float> scores = Scores(kTokens);
    std::vector<float> got(kTokens);
    ASSERT_EQ(more->Add({1, std::nullopt}, scores.data(), SerialFor), absl::OkStatus());
    ASSERT_EQ(more->Read(1, got.data()), absl::OkStatus());
    EXPECT_EQ(got, scores);
  }
  EXPECT_EQ(Pool().used_bytes, 0);
  EXPECT_EQ(Make(kAll / 2)->gpu(), 0);
}

TEST_F(DeviceVectorsTest, ErrorsAreTold) {
  Start();
  const std::unique_ptr<ResidentVectors> vectors = Make(2);
  const std::vector<float> scores = Scores(kTokens);
  ASSERT_EQ(vectors->Add({0, std::nullopt}, scores.data(), SerialFor), absl::OkStatus());
  ASSERT_EQ(vectors->Add({1, std::nullopt}, scores.data(), SerialFor), absl::OkStatus());
  std::vector<int32_t> positions(20);
  for (int what = 0; what < 3; ++what) {
    FakeCuda::FailLaunch(0, cudaErrorMemoryAllocation);
    const absl::Status status =
        what == 0 ? vectors->Add({0, 0.9F}, scores.data(), SerialFor)
        : what == 1
            ? vectors->Fold(0, 0.9F, {1}, SerialFor)
            : vectors->Select(0, {.tokens = kTokens, .window = 5, .keep = 20}, positions.data());
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << what;
  }
  EXPECT_EQ(backend_->Health(), absl::OkStatus());
}

// Of a prompt whose layers lie on several GPUs.
TEST_F(DeviceVectorsTest, AnotherGpusVectorGetsTheSumByWayOfTheHost) {
  Start({.count = 2});
  const SaliencyParams params = inputs_.params();
  const auto tokens = static_cast<size_t>(kShape.tokens);
  const auto key_bytes = static_cast<size_t>(kShape.kv_heads * kShape.tokens * kShape.dim * 2);
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  const cuda::DeviceBytes keys = *cuda::MakeDeviceBytes(static_cast<int64_t>(key_bytes));
  const auto stream = *cuda::MakeStream();
  const cuda::PinnedBytes pinned = *cuda::MakePinnedBytes(static_cast<int64_t>(key_bytes));
  std::memcpy(pinned.get(), params.keys.data, key_bytes);
  ASSERT_EQ(
      cudaMemcpyAsync(keys.get(), pinned.get(), key_bytes, cudaMemcpyHostToDevice, stream.get()),
      cudaSuccess);
  ASSERT_EQ(cudaStreamSynchronize(stream.get()), cudaSuccess);
  for (const int gpu : {0, 1}) {
    ASSERT_EQ(cudaSetDevice(gpu), cudaSuccess);
    const cuda::DeviceBytes near = *cuda::MakeDeviceBytes(256);
    const std::unique_ptr<ResidentVectors> vectors =
        backend_->Resident(2, kShape.tokens, near.get(), nullptr);
    ASSERT_EQ(vectors->gpu(), gpu);
    std::vector<float> sum(tokens);
    std::vector<int32_t> positions(20);
    SaliencySums sums;
    LayerPass pass = {.saliency = params,
                      .top_count = 9,
                      .window = kShape.window,
                      .keep = 20,
                      .resident = vectors.get(),
                      .resident_to = {.vector = 1},
                      .sum = sum.data(),
                      .positions = positions.data(),
                      .sums = &sums};
    pass.saliency.keys.data = keys.get();
    ASSERT_EQ(backend_->RunLayer(pass, nullptr, SerialFor), absl::OkStatus());
    pass.resident_to.decay = 0.75F;
    ASSERT_EQ(backend_->RunLayer(pass, nullptr, SerialFor), absl::OkStatus());
    std::vector<float> got(tokens);
    ASSERT_EQ(vectors->Read(1, got.data()), absl::OkStatus());
    for (size_t j = 0; j < tokens; ++j) EXPECT_EQ(got[j], std::fma(0.75F, sum[j], sum[j]));
  }
}

// Keys of the host's go to the GPU of the prompt's vectors, and its sum crosses no bus.
TEST_F(DeviceVectorsTest, CallsOfHostTensorsGoToTheVectors) {
  Start({.count = 2});
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  const cuda::DeviceBytes near = *cuda::MakeDeviceBytes(256);
  const std::unique_ptr<ResidentVectors> vectors =
      backend_->Resident(1, kShape.tokens, near.get(), nullptr);
  ASSERT_EQ(vectors->gpu(), 1);
  std::vector<int32_t> positions(6);
  SaliencySums sums;
  FakeCuda::TakeLog();
  ASSERT_EQ(backend_->RunLayer({.saliency = inputs_.params(),
                                .top_count = 9,
                                .window = kShape.window,
                                .keep = 6,
                                .resident = vectors.get(),
                                .positions = positions.data(),
                                .sums = &sums},
                               nullptr, SerialFor),
            absl::OkStatus());
  EXPECT_GT(FakeCuda::kernels(1), 0);
  EXPECT_EQ(FakeCuda::kernels(0), 0);
  int64_t bytes_back = 0;
  for (const FakeWork& work : FakeCuda::TakeLog()) {
    if (work.kind == FakeWork::Kind::kFromDevice) bytes_back += work.bytes;
  }
  EXPECT_GT(bytes_back, 0);
  EXPECT_LE(bytes_back, 3 * cuda::kPartBytes) << "flags, sums and positions";
}

}  // namespace
}  // namespace structkv
