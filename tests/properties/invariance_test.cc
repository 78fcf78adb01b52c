// One prompt is answered alike, to the bit, however its layers are ordered, its pieces cut, its
// heads divided, its tensors laid out and its work spread over threads: random prompts through the
// engine and through sessions, on every backend.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/backend.h"
#include "service/engine/prompt.h"
#include "service/engine/shard.h"
#include "tests/kernels/backends_under_test.h"
#include "tests/kernels/random_tensor.h"
#include "tests/properties/random_prompt.h"
#include "tests/properties/session_runner.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/shards.h"

namespace structkv::testkit {
namespace {

using ::testing::IsEmpty;

constexpr uint64_t kPrompts = 40;

class InvarianceTest : public ::testing::TestWithParam<std::string> {
 protected:
  // Calls check(data, random, answer) with what the engine answers to the layers in order.
  template <typename Check>
  void ForEachPrompt(uint64_t number, Check check) {
    for (uint64_t i = 0; i < kPrompts && !HasFailure(); ++i) {
      const uint64_t seed = structkv::testing::Seed() + 100'000 + 1000 * number + i;
      Random random(seed);
      PromptData data(RandomOpen(&random), seed);
      if (random.Chance(50)) AddTies(&data, &random);
      SCOPED_TRACE(absl::StrCat("seed ", seed, ": ", data.open().ShortDebugString()));
      check(data, random, Compress(data, InOrder(data.layers()), SerialFor));
    }
  }

  Answer Compress(const PromptData& data, const std::vector<uint32_t>& order,
                  ParallelFor parallel) {
    absl::StatusOr<Answer> answer = CompressDirectly(data, *backend_, &pool_, order, parallel);
    EXPECT_TRUE(answer.ok()) << answer.status();
    if (!answer.ok()) return {};
    EXPECT_THAT(answer->faults, IsEmpty());
    return *std::move(answer);
  }

  // Everything that was answered but where in the order of answers the pivot came.
  static void ExpectSame(const Answer& got, const Answer& expected) {
    EXPECT_TRUE(ResultBytes(got) == ResultBytes(expected));
    for (const auto& [index, layer] : expected.layers) {
      const auto found = got.layers.find(index);
      if (found == got.layers.end()) {
        ADD_FAILURE() << "layer " << index << " was not answered";
        continue;
      }
      for (const auto& [tensor, bytes] : layer.tensors) {
        const auto& tensors = found->second.tensors;
        EXPECT_TRUE(tensors.contains(tensor) && tensors.at(tensor) == bytes)
            << "layer " << index << ", " << v1::Tensor_Name(tensor);
      }
    }
  }

  const std::unique_ptr<Backend> backend_ = structkv::testing::MakeBackend(GetParam());
  engine::BufferPool pool_{size_t{16} << 20};
};

INSTANTIATE_TEST_SUITE_P(, InvarianceTest,
                         ::testing::ValuesIn(structkv::testing::BackendsUnderTest()),
                         [](const auto& each) { return each.param; });

TEST_P(InvarianceTest, OrderOfLayers) {
  ForEachPrompt(0, [&](const PromptData& data, Random& random, const Answer& expected) {
    std::vector<uint32_t> order = InOrder(data.layers());
    for (size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1],
                order[static_cast<size_t>(random.Between(0, static_cast<int64_t>(i) - 1))]);
    }
    ExpectSame(Compress(data, order, SerialFor), expected);
  });
}

TEST_P(InvarianceTest, NumberOfThreads) {
  ForEachPrompt(1, [&](const PromptData& data, Random&, const Answer& expected) {
    ExpectSame(Compress(data, InOrder(data.layers()), structkv::testing::BackwardsOnThreads),
               expected);
  });
}

TEST_P(InvarianceTest, Layout) {
  ForEachPrompt(2, [&](const PromptData& data, Random&, const Answer& expected) {
    Answer got = Compress(InOtherLayout(data), InOrder(data.layers()), SerialFor);
    const uint64_t heads = data.open().geometry().kv_head_count();
    const bool head_first = data.open().layout() == v1::LAYOUT_HEAD_TOKEN_DIM;
    for (auto& [index, layer] : got.layers) {
      const uint64_t kept = layer.kept_tokens;
      for (const v1::Tensor tensor : {v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
        if (!layer.tensors.contains(tensor)) continue;
        std::string& bytes = layer.tensors[tensor];
        bytes = Transposed(bytes, head_first ? kept : heads, head_first ? heads : kept);
      }
    }
    ExpectSame(got, expected);
  });
}

TEST_P(InvarianceTest, NumberOfShards) {
  int divided = 0;
  ForEachPrompt(3, [&](const PromptData& data, Random&, const Answer& expected) {
    const engine::PromptSpec whole = SpecOf(data.open());
    for (const uint32_t ranks : {2U, 4U, 8U}) {
      std::vector<engine::Shard> shards;
      for (uint32_t i = 0; i < ranks; ++i) {
        const absl::StatusOr<engine::Shard> shard = engine::EvenShard(whole.geometry, ranks, i);
        if (shard.ok()) shards.push_back(*shard);
      }
      if (shards.size() != ranks) continue;
      ++divided;
      const std::vector<PromptData> parts = SplitByRanks(data, ranks);
      engine::Prompt prompt(SpecOf(parts[0].open()), backend_.get(), &pool_, shards);
      std::vector<Answer> answers(ranks);
      for (uint32_t layer = 0; layer < data.layers(); ++layer) {
        std::vector<engine::LayerInput> inputs;
        for (const PromptData& part : parts) inputs.push_back(InputOf(part, layer, &pool_));
        int64_t culprit = -1;
        absl::StatusOr<std::vector<engine::LayerOutput>> outputs =
            prompt.CompressShards(std::move(inputs), SerialFor, &culprit);
        ASSERT_TRUE(outputs.ok()) << outputs.status();
        const std::optional<engine::PivotResult> pivot = prompt.TakePivot();
        for (uint32_t i = 0; i < ranks; ++i) {
          AddLayer((*outputs)[i], &answers[i]);
          if (pivot.has_value()) AddPivot(*pivot, &answers[i]);
        }
      }
      for (uint32_t i = 0; i < ranks; ++i) {
        SCOPED_TRACE(absl::StrCat("rank ", i, " of ", ranks));
        Answer slice = SliceAnswer(data.open(), expected, parts[i].open().shard_group());
        ExpectSame(answers[i], slice);
      }
    }
  });
  EXPECT_GT(divided, 15);
}

TEST_P(InvarianceTest, PiecesChunksAndThreadsOfASession) {
  for (const int threads : {1, 3}) {
    session::SessionManager manager(
        {.memory_budget_bytes = int64_t{4} << 30, .idle_buffer_bytes = 1 << 20, .threads = threads},
        structkv::testing::MakeBackend(GetParam()));
    ForEachPrompt(4, [&](const PromptData& data, Random& random, const Answer& expected) {
      session::SessionRequest request{.spec = SpecOf(data.open())};
      request.layers_in_flight = request.spec.geometry.layers;
      const absl::StatusOr<Answer> answer = RunMessages(
          manager, data, request, session::RandomMessages(data, request.spec, &random), &random);
      ASSERT_TRUE(answer.ok()) << answer.status();
      ExpectSame(*answer, expected);
      EXPECT_THAT(CompareResultsWithOracle(data, *answer), IsEmpty());
    });
    EXPECT_TRUE(session::Eventually([&] {
      return manager.budget().reserved_bytes() == 0 && manager.buffers().in_use_bytes() == 0;
    }));
  }
}

}  // namespace
}  // namespace structkv::testkit
