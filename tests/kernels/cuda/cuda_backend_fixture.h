// What tests of the CUDA backend on the fake runtime have in common.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "kernels/reference/reference_backend.h"
#include "tests/kernels/cuda/fake_backend.h"
#include "tests/kernels/random_tensor.h"
#include "tests/kernels/saliency_inputs.h"

namespace structkv::testing {

inline constexpr int64_t kMiB = int64_t{1} << 20;

class CudaBackendTest : public ::testing::Test {
 protected:
  static constexpr Shape kShape = {4, 2, 90, 32, 4};

  void SetUp() override { FakeCuda::Reset({}); }
  void TearDown() override {
    backend_.reset();
    EXPECT_EQ(FakeCuda::held(), FakeHeld());
  }

  void Start(const FakeGpus& gpus = {},
             cuda::DeviceOptions options = {.memory_bytes = 64 * kMiB, .slice_bytes = 4096},
             std::function<void(const absl::Status&)> fell_back = nullptr) {
    FakeCuda::Reset(gpus);
    backend_ = MakeFakeBackend(options, {.fell_back = std::move(fell_back)});
  }

  absl::Status Saliency(std::vector<float>* out = nullptr) const {
    return SaliencyOf(inputs_.params(), out);
  }
  absl::Status SaliencyOf(const SaliencyParams& params, std::vector<float>* out = nullptr) const {
    std::vector<float> local;
    std::vector<float>& result = out != nullptr ? *out : local;
    result.assign(static_cast<size_t>(params.keys.heads * params.keys.tokens), -1.0F);
    return backend_->Saliency(params, result.data(), nullptr, SerialFor);
  }
  void ExpectWorks() const {
    std::vector<float> out;
    ASSERT_EQ(Saliency(&out), absl::OkStatus());
    ExpectNear(out, Expected(inputs_.params()), inputs_.params(),
               /*half=*/true);
  }

  std::vector<float> Scores(int64_t tokens) {
    std::vector<float> scores(static_cast<size_t>(tokens));
    std::uniform_real_distribution<float> uniform(0.0F, 1.0F);
    for (float& s : scores) s = uniform(random_);
    return scores;
  }
  std::vector<int32_t> Selected(const std::vector<float>& scores) const {
    std::vector<int32_t> positions(20, -1);
    backend_->Select({scores.data(), static_cast<int64_t>(scores.size()), 5, 20}, positions.data());
    return positions;
  }
  std::vector<int32_t> Wanted(const std::vector<float>& scores) const {
    std::vector<int32_t> positions(20, -1);
    reference_->Select({scores.data(), static_cast<int64_t>(scores.size()), 5, 20},
                       positions.data());
    return positions;
  }

  std::mt19937_64 random_ = Random(7000);
  const Inputs inputs_{kShape, DType::kBF16, Layout::kHeadTokenDim, random_};
  const std::unique_ptr<Backend> reference_ = reference::CreateReferenceBackend();
  std::unique_ptr<Backend> backend_;
};

}  // namespace structkv::testing
