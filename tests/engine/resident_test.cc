// Prompts on a GPU, that of the fake CUDA runtime: StructKV's centrality stays there, and answers
// do not tell where it lay.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "tests/kernels/cuda/fake_backend.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/prompt_cases.h"

namespace structkv::engine {
namespace {

using structkv::testing::FakeCuda;
using structkv::testing::FakeHeld;
using structkv::testing::FakeWork;
using structkv::testing::MakeFakeBackend;
using testkit::Answer;
using testkit::PromptCase;
using testkit::PromptData;

constexpr int64_t kMemoryBytes = int64_t{64} << 20;

class ResidentTest : public ::testing::TestWithParam<PromptCase> {
 protected:
  void SetUp() override { FakeCuda::Reset({}); }
  void TearDown() override { EXPECT_EQ(FakeCuda::held(), FakeHeld()); }

  // `share`: DeviceOptions::resident_share.
  absl::StatusOr<Answer> Compress(int64_t share, const std::vector<uint32_t>& order) const {
    const auto backend = MakeFakeBackend({.memory_bytes = kMemoryBytes, .resident_share = share});
    BufferPool pool(0);
    auto answer = testkit::CompressDirectly(data_, *backend, &pool, order, SerialFor);
    EXPECT_EQ(backend->stats().gpus[0].resident.used_bytes, 0);
    return answer;
  }

  const PromptData data_{GetParam().open, 22};
};

INSTANTIATE_TEST_SUITE_P(Cases, ResidentTest, ::testing::ValuesIn(testkit::PromptCases()),
                         [](const auto& each) { return each.param.name; });

TEST_P(ResidentTest, AnswersAreThoseOfVectorsInTheHostsMemory) {
  std::vector<uint32_t> order = testkit::InOrder(data_.layers());
  for (const bool backwards : {false, true}) {
    if (backwards) std::reverse(order.begin(), order.end());
    const absl::StatusOr<Answer> wanted = Compress(0, order);
    const absl::StatusOr<Answer> got = Compress(16, order);
    ASSERT_TRUE(wanted.ok()) << wanted.status();
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_TRUE(testkit::ResultBytes(*got) == testkit::ResultBytes(*wanted));
  }
}

// Whichever launch has no memory: the layer fails, so does all that follows, and nothing is kept.
TEST(ResidentPromptTest, AFailureIsThatOfThePrompt) {
  const PromptData data(testkit::SmallOpen(), 24);
  for (const bool backwards : {false, true}) {
    std::vector<uint32_t> order = testkit::InOrder(data.layers());
    if (backwards) std::reverse(order.begin(), order.end());
    for (int64_t n = 0;; ++n) {
      FakeCuda::Reset({});
      const auto backend = MakeFakeBackend({.memory_bytes = kMemoryBytes});
      BufferPool pool(0);
      std::optional<Prompt> prompt;
      prompt.emplace(testkit::SpecOf(data.open()), backend.get(), &pool);
      FakeCuda::FailLaunch(n, cudaErrorMemoryAllocation);
      absl::Status status;
      for (const uint32_t layer : order) {
        const auto output = prompt->CompressLayer(testkit::InputOf(data, layer, &pool), SerialFor);
        if (status.ok()) {
          status = output.status();
        } else {
          EXPECT_EQ(output.status().code(), absl::StatusCode::kFailedPrecondition);
        }
      }
      if (status.ok()) {
        EXPECT_GT(n, 3 * static_cast<int64_t>(order.size())) << "launches of all layers";
        EXPECT_TRUE(prompt->TakePivot().has_value());
      } else {
        EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
        EXPECT_FALSE(prompt->TakePivot().has_value());
      }
      prompt.reset();
      EXPECT_EQ(backend->stats().gpus[0].resident.used_bytes, 0);
      EXPECT_EQ(backend->stats().gpus[0].calls.used_bytes, 0);
      if (status.ok()) break;
    }
  }
}

// What comes back of a layer: its results, and no vector of all tokens.
TEST(ResidentPromptTest, NoVectorCrossesTheBus) {
  FakeCuda::Reset({});
  v1::Open open = testkit::SmallOpen(4000);
  open.set_output(v1::OUTPUT_PLAN);
  const PromptData data(open, 23);
  const auto backend = MakeFakeBackend({.memory_bytes = kMemoryBytes});
  BufferPool pool(0);
  Prompt prompt(testkit::SpecOf(data.open()), backend.get(), &pool);
  FakeCuda::TakeLog();
  int layers_with_vectors = 0;
  for (uint32_t layer = 0; layer < data.layers(); ++layer) {
    const auto output = prompt.CompressLayer(testkit::InputOf(data, layer, &pool), SerialFor);
    ASSERT_TRUE(output.ok()) << output.status();
    for (const FakeWork& work : FakeCuda::TakeLog()) {
      if (work.kind == FakeWork::Kind::kFromDevice) {
        EXPECT_LT(work.bytes, 4000 * 4) << "layer " << layer;
      }
    }
    if (backend->stats().gpus[0].resident.used_bytes > 0) ++layers_with_vectors;
  }
  EXPECT_GT(layers_with_vectors, 0);
  EXPECT_TRUE(prompt.TakePivot().has_value());
}

}  // namespace
}  // namespace structkv::engine
