// Layers that are staged ahead of their call: those that go to the backend in one, and no others.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <utility>

#include "kernels/layer_pass.h"
#include "service/engine/prompt.h"
#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/forwarding_backend.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/prompt_cases.h"

namespace structkv::engine {
namespace {

using testkit::PromptCase;
using testkit::PromptData;

// Has layers whole, and refuses each once it has looked at what was staged for it.
class StagingBackend final : public testing::ForwardingBackend {
 public:
  class Keys final : public StagedLayer {
   public:
    Keys(const void* data, int* alive) : data_(data), alive_(alive) { ++*alive_; }
    ~Keys() override { --*alive_; }
    const void* data() const { return data_; }

   private:
    const void* const data_;
    int* const alive_;
  };

  StagingBackend()
      : ForwardingBackend(testing::MakeBackend("reference")),
        capabilities_(ForwardingBackend::capabilities()) {
    capabilities_.whole_layers = true;
  }
  const BackendCapabilities& capabilities() const override { return capabilities_; }
  std::unique_ptr<StagedLayer> Stage(const SaliencyParams& params, int /*gpu*/) const override {
    return std::make_unique<Keys>(params.keys.data, &alive_);
  }
  absl::Status RunLayer(const LayerPass& pass, BadStatistic* /*bad*/,
                        ParallelFor /*parallel*/) const override {
    ++layers_;
    if (pass.staged != nullptr) {
      ++staged_layers_;
      EXPECT_EQ(static_cast<const Keys*>(pass.staged)->data(), pass.saliency.keys.data);
    }
    return absl::UnimplementedError("refused");
  }
  absl::Status Saliency(const SaliencyParams& params, float* out, BadStatistic* bad,
                        ParallelFor parallel) const override {
    EXPECT_EQ(alive_, 0) << "the steps compute while something is staged";
    return real().Saliency(params, out, bad, parallel);
  }

  int alive() const { return alive_; }
  int layers() const { return layers_; }
  int staged_layers() const { return staged_layers_; }

 private:
  BackendCapabilities capabilities_;
  mutable int alive_ = 0;
  mutable int layers_ = 0;
  mutable int staged_layers_ = 0;
};

class StageTest : public ::testing::TestWithParam<PromptCase> {
 protected:
  const PromptData data_{GetParam().open, 21};
  const PromptSpec spec_ = testkit::SpecOf(data_.open());
  BufferPool pool_{0};
};

INSTANTIATE_TEST_SUITE_P(Cases, StageTest, ::testing::ValuesIn(testkit::PromptCases()),
                         [](const auto& each) { return each.param.name; });

TEST_P(StageTest, WhatGoesInOneCallIsStagedAndGoneAfterIt) {
  const StagingBackend backend;
  Prompt prompt(spec_, &backend, &pool_);
  for (uint32_t layer = 0; layer < data_.layers(); ++layer) {
    LayerInput input = testkit::InputOf(data_, layer, &pool_);
    const int before = backend.layers();
    prompt.Stage(&input);
    const StagedLayer* const first = input.staged.get();
    prompt.Stage(&input);
    EXPECT_EQ(input.staged.get(), first) << "once is enough";
    const bool staged = first != nullptr;
    const absl::StatusOr<LayerOutput> output = prompt.CompressLayer(std::move(input), SerialFor);
    ASSERT_TRUE(output.ok()) << output.status();
    EXPECT_EQ(backend.layers() - before, staged ? 1 : 0) << "layer " << layer;
    EXPECT_EQ(backend.alive(), 0);
  }
  EXPECT_EQ(backend.staged_layers(), backend.layers());
}

// Without such calls, as on a CPU, nothing is ever staged.
TEST_P(StageTest, NothingIsStagedForABackendOfSteps) {
  const auto backend = testing::MakeBackend("reference");
  const Prompt prompt(spec_, backend.get(), &pool_);
  LayerInput input = testkit::InputOf(data_, 0, &pool_);
  prompt.Stage(&input);
  EXPECT_EQ(input.staged, nullptr);
}

}  // namespace
}  // namespace structkv::engine
