// One prompt is answered alike, to the bit, however its layers are ordered, its pieces cut, its
// heads divided, its tensors laid out and its work spread over threads: random prompts through the
// engine and through sessions, on every backend.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
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

// Dense in either order of axes, and in blocks.
TEST_P(InvarianceTest, Layout) {
  ForEachPrompt(2, [&](const PromptData& data, Random& random, const Answer& expected) {
    for (const v1::Layout layout : {v1::LAYOUT_HEAD_TOKEN_DIM, v1::LAYOUT_TOKEN_HEAD_DIM}) {
      for (const bool paged : {false, true}) {
        v1::Open open = data.open();
        open.set_layout(layout);
        open.clear_paged();
        if (paged) RandomBlocks(&random, &open);
        SCOPED_TRACE(absl::StrCat(v1::Layout_Name(layout), ", ", open.paged().ShortDebugString()));
        const Answer got = Compress(Rearranged(data, open), InOrder(data.layers()), SerialFor);
        ExpectSame(got, Rearranged(expected, data.open(), open));
      }
    }
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

class SessionInvarianceTest : public InvarianceTest {
 protected:
  void Start(int threads) {
    manager_ = std::make_unique<session::SessionManager>(
        session::SessionManagerOptions{.memory_budget_bytes = int64_t{4} << 30,
                                       .idle_buffer_bytes = 1 << 20,
                                       .threads = threads},
        structkv::testing::MakeBackend(GetParam()));
  }

  // All layers may be in flight.
  static session::SessionInput InputAtRandom(const PromptData& data, const engine::PromptSpec& spec,
                                             std::optional<engine::ShardMember> shard,
                                             Random* random) {
    const engine::PromptSpec own = shard.has_value() ? engine::ShardSpec(spec, shard->heads) : spec;
    session::SessionInput input = {
        .data = &data,
        .request = {
            .spec = spec, .layers_in_flight = spec.geometry.layers, .shard = std::move(shard)}};
    input.messages = session::RandomMessages(data, own, random);
    return input;
  }

  void ExpectMemoryBack() {
    EXPECT_TRUE(session::Eventually([&] {
      return manager_->budget().reserved_bytes() == 0 && manager_->buffers().in_use_bytes() == 0;
    })) << manager_->budget().reserved_bytes()
        << " bytes";
  }

  std::unique_ptr<session::SessionManager> manager_;
};

INSTANTIATE_TEST_SUITE_P(, SessionInvarianceTest,
                         ::testing::ValuesIn(structkv::testing::BackendsUnderTest()),
                         [](const auto& each) { return each.param; });

TEST_P(SessionInvarianceTest, PiecesChunksAndThreads) {
  for (const int threads : {1, 3}) {
    Start(threads);
    ForEachPrompt(4, [&](const PromptData& data, Random& random, const Answer& expected) {
      const session::SessionInput input =
          InputAtRandom(data, SpecOf(data.open()), std::nullopt, &random);
      const absl::StatusOr<std::vector<Answer>> answers =
          session::RunSessions(*manager_, {input}, &random);
      ASSERT_TRUE(answers.ok()) << answers.status();
      ExpectSame(answers->front(), expected);
      EXPECT_THAT(CompareResultsWithOracle(data, answers->front()), IsEmpty());
    });
    ExpectMemoryBack();
  }
}

// Each rank gets the positions of the whole prompt and the rows of its heads.
TEST_P(SessionInvarianceTest, NumberOfShards) {
  std::map<uint32_t, int> divided;
  for (const int threads : {1, 3}) {
    Start(threads);
    ForEachPrompt(5, [&](const PromptData& data, Random& random, const Answer& expected) {
      const engine::PromptSpec whole = SpecOf(data.open());
      for (const uint32_t ranks : {1U, 2U, 4U}) {
        if (!engine::EvenShard(whole.geometry, ranks, 0).ok()) continue;
        ++divided[ranks];
        SCOPED_TRACE(absl::StrCat(ranks, " ranks"));
        const std::vector<PromptData> parts = SplitByRanks(data, ranks);
        std::vector<session::SessionInput> inputs;
        for (uint32_t i = 0; i < ranks; ++i) {
          const engine::ShardMember member = {
              .group_id = "group",
              .shard_count = ranks,
              .shard_index = i,
              .heads = *engine::EvenShard(whole.geometry, ranks, i)};
          inputs.push_back(InputAtRandom(parts[i], whole, member, &random));
        }
        const absl::StatusOr<std::vector<Answer>> answers =
            session::RunSessions(*manager_, inputs, &random);
        ASSERT_TRUE(answers.ok()) << answers.status();
        for (uint32_t i = 0; i < ranks; ++i) {
          SCOPED_TRACE(absl::StrCat("rank ", i));
          ExpectSame((*answers)[i],
                     SliceAnswer(data.open(), expected, parts[i].open().shard_group()));
        }
      }
    });
    ExpectMemoryBack();
  }
  EXPECT_GT(divided[2], 15);
  EXPECT_GT(divided[4], 15);
}

}  // namespace
}  // namespace structkv::testkit
