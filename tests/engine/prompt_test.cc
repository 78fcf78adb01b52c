// Whole prompts through engine::Prompt, on every backend: against the oracle, in any order, on any
// threads, and within the memory that was promised.
#include "service/engine/prompt.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "service/engine/scheduler.h"
#include "tests/kernels/backends_under_test.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/prompt_cases.h"

namespace structkv::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using testkit::Answer;
using testkit::InOrder;
using testkit::PromptCase;
using testkit::PromptData;

constexpr uint64_t kSeed = 20;
constexpr size_t kIdleBytes = size_t{16} << 20;

std::string NameOf(const ::testing::TestParamInfo<std::tuple<std::string, PromptCase>>& info) {
  return std::get<0>(info.param) + "_" + std::get<1>(info.param).name;
}

// The oracle, and the best instruction set of the machine; the others are the conformance suite's.
std::vector<std::string> Backends() {
  std::vector<std::string> names = testing::BackendsUnderTest();
  names.resize(std::min<size_t>(names.size(), 2));
  return names;
}

class PromptTest : public ::testing::TestWithParam<std::tuple<std::string, PromptCase>> {
 protected:
  Answer Compress(const std::vector<uint32_t>& order, ParallelFor parallel = SerialFor) {
    absl::StatusOr<Answer> answer =
        testkit::CompressDirectly(data_, *backend_, &pool_, order, parallel);
    EXPECT_TRUE(answer.ok()) << answer.status();
    if (!answer.ok()) return {};
    EXPECT_THAT(answer->faults, IsEmpty());
    return *std::move(answer);
  }
  std::string Bytes(const std::vector<uint32_t>& order, ParallelFor parallel = SerialFor) {
    return testkit::ResultBytes(Compress(order, parallel));
  }

  const std::unique_ptr<Backend> backend_ = testing::MakeBackend(std::get<0>(GetParam()));
  const PromptData data_{std::get<1>(GetParam()).open, kSeed};
  const PromptSpec spec_ = testkit::SpecOf(data_.open());
  BufferPool pool_{kIdleBytes};
};

INSTANTIATE_TEST_SUITE_P(Cases, PromptTest,
                         ::testing::Combine(::testing::ValuesIn(Backends()),
                                            ::testing::ValuesIn(testkit::PromptCases())),
                         NameOf);

TEST_P(PromptTest, IsWhatTheOracleSays) {
  const Answer answer = Compress(InOrder(data_.layers()));
  EXPECT_THAT(testkit::CompareResultsWithOracle(data_, answer), IsEmpty());
}

TEST_P(PromptTest, AnyOrderOfLayersGivesTheSame) {
  std::vector<uint32_t> order = InOrder(data_.layers());
  const std::string expected = Bytes(order);
  std::reverse(order.begin(), order.end());
  EXPECT_TRUE(Bytes(order) == expected) << "from the last to the first";
  std::mt19937 random(kSeed);
  for (int i = 0; i < 5; ++i) {
    std::shuffle(order.begin(), order.end(), random);
    EXPECT_TRUE(Bytes(order) == expected) << ::testing::PrintToString(order);
  }
}

TEST_P(PromptTest, ThePivotComesOnceAndAsSoonAsItIsKnown) {
  std::vector<uint32_t> order = InOrder(data_.layers());
  std::mt19937 random(kSeed);
  for (int i = 0; i < 3; ++i) {
    const Answer answer = Compress(order);
    ASSERT_EQ(answer.pivot.has_value(), spec_.method.has_skeleton());
    if (!answer.pivot.has_value()) return;
    const bool fixed = spec_.method.pivot.mode == method::PivotMode::kFixed;
    size_t needed = order.size();
    if (fixed) {
      needed = 0;  // up to where the last of the layers 0 .. fixed_layer lies in the order
      for (size_t at = 0; at < order.size(); ++at) {
        if (order[at] <= spec_.method.pivot.fixed_layer) needed = at + 1;
      }
    }
    EXPECT_EQ(answer.layers_before_pivot, needed) << ::testing::PrintToString(order);
    EXPECT_EQ(answer.pivot->decision.layers_size(),
              fixed ? spec_.method.pivot.fixed_layer + 1 : spec_.geometry.layers);
    std::shuffle(order.begin(), order.end(), random);
  }
}

TEST_P(PromptTest, ThreadsLeaveNoTrace) {
  const std::vector<uint32_t> order = InOrder(data_.layers());
  const std::string expected = Bytes(order);
  EXPECT_TRUE(Bytes(order, testing::BackwardsOnThreads) == expected);
  std::string scheduled;
  {
    Scheduler scheduler(3);
    scheduler.Post(scheduler.NewLane(), /*small=*/false,
                   [&](ParallelFor parallel) { scheduled = Bytes(order, parallel); });
  }
  EXPECT_TRUE(scheduled == expected);
}

// A plan keeps the tokens that the compacted answer has.
TEST_P(PromptTest, APlanHasThePositionsOfTheCompactedAnswer) {
  v1::Open open = data_.open();
  const bool plan = open.output() == v1::OUTPUT_PLAN;
  open.set_output(plan ? v1::OUTPUT_COMPACT : v1::OUTPUT_PLAN);
  PromptData other(open, kSeed + 1);
  for (uint32_t layer = 0; layer < data_.layers();
       ++layer) {  // the same tensors, where both have one
    for (const v1::Tensor tensor : data_.effective().tensors) {
      std::string* const bytes = other.mutable_tensor(layer, tensor);
      if (!bytes->empty()) *bytes = data_.tensor(layer, tensor);
    }
  }
  const Answer mine = Compress(InOrder(data_.layers()));
  const absl::StatusOr<Answer> others =
      testkit::CompressDirectly(other, *backend_, &pool_, InOrder(data_.layers()), SerialFor);
  ASSERT_TRUE(others.ok()) << others.status();
  for (const auto& [index, layer] : mine.layers) {
    const auto& tensors = others->layers.at(index).tensors;
    EXPECT_EQ(layer.tensors.at(v1::TENSOR_POSITIONS), tensors.at(v1::TENSOR_POSITIONS));
    EXPECT_EQ(layer.tensors.count(v1::TENSOR_KEYS), plan ? 0U : 1U);
    EXPECT_EQ(tensors.count(v1::TENSOR_KEYS), plan ? 1U : 0U);
  }
  if (mine.pivot.has_value()) {
    EXPECT_EQ(mine.pivot->tensors, others->pivot->tensors);
  }
}

TEST_P(PromptTest, BuffersComeBack) {
  std::vector<LayerOutput> outputs;
  {
    Prompt prompt(spec_, backend_.get(), &pool_);
    for (uint32_t layer = 0; layer < data_.layers(); ++layer) {
      EXPECT_FALSE(prompt.done());
      absl::StatusOr<LayerOutput> output =
          prompt.CompressLayer(testkit::InputOf(data_, layer, &pool_), SerialFor);
      ASSERT_TRUE(output.ok()) << output.status();
      outputs.push_back(*std::move(output));
    }
    EXPECT_TRUE(prompt.done());
  }
  // Nothing but the answers is held, and they outlive the prompt.
  size_t held = 0;
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (const LayerOutput& output : outputs) {
    for (const Buffer* buffer : {&output.keys, &output.values, &output.saliency}) {
      held += (buffer->size() + page - 1) / page * page;
    }
  }
  EXPECT_GE(pool_.in_use_bytes(), held);
  // A reused run may be larger than what was asked for, by an eighth or two pages.
  EXPECT_LE(pool_.in_use_bytes(), held + held / 8 + outputs.size() * 3 * 2 * page);
  outputs.clear();
  EXPECT_EQ(pool_.in_use_bytes(), 0U);
}

// Buffers are whole pages; a layer has at most thirteen: seven of input, the saliency of the heads,
// its sum, scratch, keys and values that are kept, and one to spare.
TEST_P(PromptTest, ALayerTakesNoMoreMemoryThanWasPlanned) {
  const MemoryPlan plan = PlanMemory(spec_, *backend_);
  const auto page = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
  BufferPool pool(0);  // no reuse, so that runs have the size that was asked for
  Prompt prompt(spec_, backend_.get(), &pool);
  for (uint32_t layer = 0; layer < data_.layers(); ++layer) {
    const absl::StatusOr<LayerOutput> output =
        prompt.CompressLayer(testkit::InputOf(data_, layer, &pool), SerialFor);
    ASSERT_TRUE(output.ok()) << output.status();
    int64_t bytes = static_cast<int64_t>(output->positions.size() * sizeof(int32_t));
    for (const Buffer* buffer : {&output->keys, &output->values, &output->key_scales,
                                 &output->value_scales, &output->saliency}) {
      bytes += static_cast<int64_t>(buffer->size());
    }
    EXPECT_EQ(bytes, plan.layer_output_bytes);
  }
  const auto peak = static_cast<int64_t>(pool.peak_in_use_bytes());
  EXPECT_GE(peak, plan.layer_input_bytes);
  EXPECT_LE(peak,
            plan.layer_input_bytes + plan.layer_output_bytes + plan.scratch_bytes + 13 * page);
}

// Large enough that the kernels have several tasks, and that pages are nothing beside the tensors.
class LongPromptTest : public ::testing::TestWithParam<std::string> {
 protected:
  static v1::Open LongOpen() {
    v1::Open open = testkit::FindCase(GetParam()).open;
    open.mutable_geometry()->set_layer_count(2);
    open.set_prompt_tokens(20000);
    return open;
  }
  const std::unique_ptr<Backend> backend_ = testing::MakeBackend(testing::BackendsUnderTest()[1]);
};

INSTANTIATE_TEST_SUITE_P(Cases, LongPromptTest,
                         ::testing::Values("StructKvEverythingReturned", "StructKvPerKvHead",
                                           "StructKvPooled", "StructKvSaliencyPerKvHeadEach",
                                           "SnapKv", "Full"),
                         [](const auto& each) { return each.param; });

TEST_P(LongPromptTest, ThreadsLeaveNoTraceAndMemoryIsAsPlanned) {
  const PromptData data(LongOpen(), kSeed);
  const MemoryPlan plan = PlanMemory(testkit::SpecOf(data.open()), *backend_);
  const std::vector<uint32_t> order = InOrder(2);
  BufferPool pool(0);
  const auto bytes = [&](ParallelFor parallel) {
    const absl::StatusOr<Answer> answer =
        testkit::CompressDirectly(data, *backend_, &pool, order, parallel);
    EXPECT_TRUE(answer.ok()) << answer.status();
    return answer.ok() ? testkit::ResultBytes(*answer) : "";
  };
  const std::string expected = bytes(SerialFor);
  EXPECT_TRUE(bytes(testing::BackwardsOnThreads) == expected);
  // Several prompts at once share the threads, and know nothing of each other.
  std::vector<std::string> scheduled(3);
  {
    Scheduler scheduler(3);
    for (std::string& each : scheduled) {
      scheduler.Post(scheduler.NewLane(), /*small=*/false,
                     [&](ParallelFor parallel) { each = bytes(parallel); });
    }
  }
  for (const std::string& each : scheduled) EXPECT_TRUE(each == expected);

  BufferPool alone(0);
  ASSERT_TRUE(testkit::CompressDirectly(data, *backend_, &alone, order, SerialFor).ok());
  const auto page = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
  EXPECT_LE(static_cast<int64_t>(alone.peak_in_use_bytes()),
            plan.layer_input_bytes + plan.layer_output_bytes + plan.scratch_bytes + 13 * page);
}

}  // namespace
}  // namespace structkv::engine
