// A prompt that ranks hold together: their answers are slices of the whole prompt's, to the bit.
#include "service/engine/shard.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/kernels/backends_under_test.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/prompt_cases.h"
#include "tests/testing/shards.h"

namespace structkv::engine {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::vector<Shard> EvenShards(const ModelGeometry& geometry, int64_t count) {
  std::vector<Shard> shards;
  for (int64_t i = 0; i < count; ++i) shards.push_back(*EvenShard(geometry, count, i));
  return shards;
}

// What each of the ranks is answered.
absl::StatusOr<std::vector<testkit::Answer>> CompressShards(
    const std::vector<testkit::PromptData>& parts, const Backend& backend, BufferPool* pool,
    int64_t* culprit) {
  const PromptSpec spec = testkit::SpecOf(parts[0].open());
  Prompt prompt(spec, &backend, pool,
                EvenShards(spec.geometry, static_cast<int64_t>(parts.size())));
  std::vector<testkit::Answer> answers(parts.size());
  for (uint32_t layer = 0; layer < parts[0].layers(); ++layer) {
    std::vector<LayerInput> inputs;
    for (const testkit::PromptData& part : parts) {
      inputs.push_back(testkit::InputOf(part, layer, pool));
    }
    absl::StatusOr<std::vector<LayerOutput>> outputs =
        prompt.CompressShards(std::move(inputs), SerialFor, culprit);
    if (!outputs.ok()) return outputs.status();
    const std::optional<PivotResult> pivot = prompt.TakePivot();
    for (size_t i = 0; i < parts.size(); ++i) {
      testkit::AddLayer((*outputs)[i], &answers[i]);
      if (pivot.has_value()) testkit::AddPivot(*pivot, &answers[i]);
    }
  }
  return answers;
}

class ShardTest : public ::testing::TestWithParam<std::string> {
 protected:
  const std::unique_ptr<Backend> backend_ = structkv::testing::MakeBackend(GetParam());
  BufferPool pool_{0};
};

TEST_P(ShardTest, AnswersAreSlicesOfTheWholePrompts) {
  for (const testkit::PromptCase& each : testkit::PromptCases()) {
    const testkit::PromptData data(each.open, 5);
    const absl::StatusOr<testkit::Answer> whole = testkit::CompressDirectly(
        data, *backend_, &pool_, testkit::InOrder(data.layers()), SerialFor);
    ASSERT_TRUE(whole.ok()) << whole.status();
    for (const uint32_t ranks : {1U, 2U, 4U}) {
      SCOPED_TRACE(absl::StrCat(each.name, ", ", ranks, " ranks"));
      const std::vector<testkit::PromptData> parts = testkit::SplitByRanks(data, ranks);
      int64_t culprit = -1;
      const auto answers = CompressShards(parts, *backend_, &pool_, &culprit);
      ASSERT_TRUE(answers.ok()) << answers.status();
      for (uint32_t i = 0; i < ranks; ++i) {
        EXPECT_THAT((*answers)[i].faults, IsEmpty());
        EXPECT_TRUE(testkit::ResultBytesOfLayers((*answers)[i]) ==
                    testkit::ResultBytesOfLayers(
                        testkit::SliceAnswer(data.open(), *whole, parts[i].open().shard_group())))
            << "shard " << i;
      }
    }
  }
  EXPECT_EQ(pool_.in_use_bytes(), 0U);
}

// Every decode rank's rows are one tensor in the layout, one after the other.
TEST_P(ShardTest, RowsAreArrangedForDecodeRanks) {
  v1::Open open = testkit::SmallOpen(90);
  open.mutable_geometry()->set_query_head_count(8);
  open.mutable_geometry()->set_kv_head_count(8);
  open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
  for (const bool per_head : {false, true}) {
    open.mutable_method()->mutable_snapkv()->set_granularity(per_head ? v1::GRANULARITY_PER_KV_HEAD
                                                                      : v1::GRANULARITY_PER_LAYER);
    // Everything kept as well: the rows must still move.
    for (const double ratio : {0.4, 1.0}) {
      open.mutable_method()->mutable_snapkv()->mutable_kv_budget()->set_ratio(ratio);
      const testkit::PromptData data(open, 5);
      const absl::StatusOr<testkit::Answer> whole = testkit::CompressDirectly(
          data, *backend_, &pool_, testkit::InOrder(data.layers()), SerialFor);
      ASSERT_TRUE(whole.ok()) << whole.status();
      for (const uint32_t decode : {2U, 4U, 8U, 16U}) {
        std::vector<testkit::PromptData> parts = testkit::SplitByRanks(data, 2);
        for (testkit::PromptData& part : parts) {
          v1::ShardGroup group = part.open().shard_group();
          group.set_decode_shard_count(decode);
          part.set_shard_group(group);
        }
        int64_t culprit = -1;
        const auto answers = CompressShards(parts, *backend_, &pool_, &culprit);
        ASSERT_TRUE(answers.ok()) << answers.status();
        const uint32_t runs = std::min(decode, 8U);  // more ranks share a head's rows
        for (const v1::Tensor tensor : {v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
          std::string expected;
          for (uint32_t run = 0; run < runs; ++run) {
            v1::HeadRange heads;
            heads.set_begin(run * 8 / runs);
            heads.set_count(8 / runs);
            const testkit::LayerAnswer& layer = whole->layers.at(1);
            expected += testkit::SliceHeads(layer.tensors.at(tensor), layer.kept_tokens, 8, heads);
          }
          std::string got;
          for (const testkit::Answer& answer : *answers) {
            got += answer.layers.at(1).tensors.at(tensor);
          }
          EXPECT_TRUE(got == expected) << "for " << decode << " ranks, tensor " << tensor;
        }
      }
    }
  }
}

// In blocks, the heads of a decode rank are together in neither layout by themselves.
TEST_P(ShardTest, BlocksAreArrangedForDecodeRanks) {
  v1::Open open = testkit::SmallOpen(90);
  open.mutable_geometry()->set_query_head_count(8);
  open.mutable_geometry()->set_kv_head_count(8);
  open.mutable_method()->mutable_structkv()->mutable_kv_budget()->set_ratio(0.4);  // 36 tokens
  testkit::PageAtRandom(16, /*spare=*/1, /*seed=*/3, &open);
  for (const v1::Layout layout : {v1::LAYOUT_HEAD_TOKEN_DIM, v1::LAYOUT_TOKEN_HEAD_DIM}) {
    open.set_layout(layout);
    const testkit::PromptData data(open, 5);
    const absl::StatusOr<testkit::Answer> whole = testkit::CompressDirectly(
        data, *backend_, &pool_, testkit::InOrder(data.layers()), SerialFor);
    ASSERT_TRUE(whole.ok()) << whole.status();
    std::vector<testkit::PromptData> parts = testkit::SplitByRanks(data, 2);
    for (testkit::PromptData& part : parts) {
      v1::ShardGroup group = part.open().shard_group();
      group.set_decode_shard_count(4);
      part.set_shard_group(group);
    }
    int64_t culprit = -1;
    const auto answers = CompressShards(parts, *backend_, &pool_, &culprit);
    ASSERT_TRUE(answers.ok()) << answers.status();
    std::string expected;
    for (uint32_t run = 0; run < 4; ++run) {
      v1::HeadRange heads;
      heads.set_begin(run * 2);
      heads.set_count(2);
      expected += testkit::SliceHeads(whole->layers.at(1).tensors.at(v1::TENSOR_KEYS),
                                      layout == v1::LAYOUT_HEAD_TOKEN_DIM ? 3 : 48, 8, heads);
    }
    EXPECT_TRUE((*answers)[0].layers.at(1).tensors.at(v1::TENSOR_KEYS) +
                    (*answers)[1].layers.at(1).tensors.at(v1::TENSOR_KEYS) ==
                expected)
        << v1::Layout_Name(layout);
  }
}

// Every rank's scales are its own heads', and named as the model's.
TEST_P(ShardTest, ABadScaleNamesItsShardAndTheModelsHead) {
  v1::Open open = testkit::SmallOpen(40);
  open.set_dtype(v1::DTYPE_F8_E4M3);
  open.set_kv_scales(v1::KV_SCALES_PER_KV_HEAD);
  std::vector<testkit::PromptData> parts = testkit::SplitByRanks(testkit::PromptData(open, 5), 2);
  testkit::SetElement(v1::DTYPE_F32, 0, 0, parts[1].mutable_tensor(2, v1::TENSOR_KEY_SCALES));
  int64_t culprit = -1;
  const auto answers = CompressShards(parts, *backend_, &pool_, &culprit);
  EXPECT_EQ(answers.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(answers.status().message()),
              HasSubstr("layer 2: key_scales: that of KV head 1 is 0"));
  EXPECT_EQ(culprit, 1);
}

TEST_P(ShardTest, ABadStatisticNamesItsShardAndTheModelsHead) {
  v1::Open open = testkit::SmallOpen(40);
  open.set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
  std::vector<testkit::PromptData> parts = testkit::SplitByRanks(testkit::PromptData(open, 5), 2);
  const float bad = -1;
  std::memcpy(parts[1].mutable_tensor(2, v1::TENSOR_SALIENCY)->data() + 7 * sizeof bad, &bad,
              sizeof bad);
  int64_t culprit = -1;
  const auto answers = CompressShards(parts, *backend_, &pool_, &culprit);
  EXPECT_EQ(answers.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(answers.status().message()),
              HasSubstr("layer 2: saliency of token 7 (KV head 1) is -1"));
  EXPECT_EQ(culprit, 1);
}

TEST_P(ShardTest, APartOfAnotherSizeNamesItsShard) {
  std::vector<testkit::PromptData> parts =
      testkit::SplitByRanks(testkit::PromptData(testkit::SmallOpen(40), 5), 2);
  parts[1].mutable_tensor(0, v1::TENSOR_KEYS)->pop_back();
  int64_t culprit = -1;
  const auto answers = CompressShards(parts, *backend_, &pool_, &culprit);
  EXPECT_EQ(answers.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(culprit, 1);
}

INSTANTIATE_TEST_SUITE_P(, ShardTest, ::testing::ValuesIn(structkv::testing::BackendsUnderTest()));

// Ranges of heads

constexpr ModelGeometry kGeometry = {
    .layers = 2, .query_heads = 8, .kv_heads = 4, .key_dim = 32, .value_dim = 32};

ShardMember Member(int64_t count, int64_t index, Shard heads) {
  return {.group_id = "g", .shard_count = count, .shard_index = index, .heads = heads};
}

void ExpectInvalid(const absl::Status& status, const std::vector<std::string>& texts) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  for (const std::string& text : texts) {
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }
}

TEST(ShardRangesTest, EvenSharesAreValidAndComplete) {
  for (const int64_t count : {1, 2, 4, 8}) {
    std::vector<ShardMember> members;
    for (int64_t i = 0; i < count; ++i) {
      members.push_back(Member(count, i, *EvenShard(kGeometry, count, i)));
      EXPECT_TRUE(ValidateShard(members.back(), kGeometry).ok());
      for (int64_t j = 0; j < i; ++j) EXPECT_TRUE(CheckApart(members[i], members[j]).ok());
    }
    EXPECT_TRUE(CheckComplete(members, kGeometry).ok());
  }
  EXPECT_EQ(EvenShard(kGeometry, 8, 5)->kv_heads, (HeadRange{2, 1}));
  EXPECT_EQ(EvenShard(kGeometry, 8, 5)->query_heads, (HeadRange{5, 1}));
}

TEST(ShardRangesTest, UnevenSharesAreAllowed) {
  const std::vector<ShardMember> members = {Member(3, 0, {{0, 3}, {0, 6}}),
                                            Member(3, 1, {{3, 1}, {7, 1}}),
                                            Member(3, 2, {{3, 1}, {6, 1}})};
  for (const ShardMember& member : members) EXPECT_TRUE(ValidateShard(member, kGeometry).ok());
  EXPECT_TRUE(CheckApart(members[1], members[2]).ok());
  EXPECT_TRUE(CheckComplete(members, kGeometry).ok());
}

TEST(ShardRangesTest, WhatMakesNoSenseIsRefused) {
  ExpectInvalid(EvenShard(kGeometry, 3, 0).status(), {"3 shards", "8 query and 4 KV heads"});
  ExpectInvalid(ValidateShard(Member(0, 0, {{0, 4}, {0, 8}}), kGeometry),
                {"open.shard_group.shard_count is 0", "query_head_count (8)"});
  ExpectInvalid(ValidateShard(Member(9, 0, {{0, 4}, {0, 8}}), kGeometry), {"shard_count is 9"});
  ExpectInvalid(ValidateShard(Member(2, 2, {{0, 2}, {0, 4}}), kGeometry),
                {"open.shard_group.shard_index is 2", "(1)"});
  ExpectInvalid(ValidateShard(Member(2, 0, {{0, 0}, {0, 4}}), kGeometry), {"kv_heads are [0, 0)"});
  ExpectInvalid(ValidateShard(Member(2, 0, {{3, 2}, {6, 2}}), kGeometry), {"kv_heads are [3, 5)"});
  ExpectInvalid(ValidateShard(Member(2, 0, {{3, 1}, {7, 2}}), kGeometry),
                {"query_heads are [7, 9)"});
  // A part of the group of two KV heads, and heads of another one.
  ExpectInvalid(ValidateShard(Member(2, 0, {{0, 2}, {0, 3}}), kGeometry),
                {"query_heads are [0, 3)", "KV heads [0, 2)", "[0, 4)"});
  ExpectInvalid(ValidateShard(Member(2, 0, {{1, 1}, {4, 2}}), kGeometry),
                {"query_heads are [4, 6)"});
  ShardMember nameless = Member(2, 0, {{0, 2}, {0, 4}});
  nameless.group_id.clear();
  ExpectInvalid(ValidateShard(nameless, kGeometry), {"group_id is empty"});
  nameless.group_id.assign(129, 'g');
  ExpectInvalid(ValidateShard(nameless, kGeometry), {"group_id has 129 bytes; at most 128"});
  ExpectInvalid(CheckApart(Member(2, 0, {{0, 2}, {0, 4}}), Member(2, 1, {{1, 1}, {3, 1}})),
                {"query_heads of shard 0 are [0, 4)", "shard 1 [3, 4)"});
  ExpectInvalid(
      CheckComplete({Member(2, 0, {{0, 2}, {0, 4}}), Member(2, 1, {{3, 1}, {6, 2}})}, kGeometry),
      {"query_heads [4, 6) of the model's 8"});
  ExpectInvalid(CheckComplete({Member(1, 0, {{0, 3}, {0, 6}})}, kGeometry),
                {"query_heads [6, 8) of the model's 8"});
}

}  // namespace
}  // namespace structkv::engine
