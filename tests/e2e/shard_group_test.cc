// Tensor-parallel ranks: each on a stream of its own, together one prompt. Every rank's answer is
// its slice of what one stream of all heads gets, to the byte; they succeed or fail together.
#include <google/protobuf/text_format.h>

#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/process.h"
#include "tests/testing/pull.h"
#include "tests/testing/service_test.h"
#include "tests/testing/shards.h"

namespace structkv::testkit {
namespace {

using ::testing::IsEmpty;

// 8 query and 4 KV heads: with 8 ranks two share a KV head.
v1::Open ShardOpen(const std::string& changes = "") {
  v1::Open open = SmallOpen(210);
  open.mutable_geometry()->set_layer_count(6);
  open.mutable_geometry()->set_query_head_count(8);
  open.mutable_geometry()->set_kv_head_count(4);
  open.mutable_geometry()->set_value_dim(64);
  v1::Open other;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(changes, &other));
  open.MergeFrom(other);
  return open;
}

class ShardGroupTest : public ServiceTest {
 protected:
  // Runs `rank(i)` for every rank, each on a thread of its own.
  static std::vector<Outcome> Together(size_t ranks, const std::function<Outcome(size_t)>& rank) {
    std::vector<Outcome> outcomes(ranks);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < ranks; ++i) {
      threads.emplace_back([&, i] { outcomes[i] = rank(i); });
    }
    for (std::thread& thread : threads) thread.join();
    return outcomes;
  }

  // Every rank sends all of its messages, on a connection of its own.
  std::vector<Outcome> RunRanks(const std::vector<PromptData>& parts) {
    return Together(parts.size(), [&](size_t i) {
      return testkit::Run(NewChannel(target()), AllMessages(parts[i]));
    });
  }

  void ExpectSlices(const PromptData& whole, const Answer& answer,
                    const std::vector<PromptData>& parts, const std::vector<Outcome>& outcomes) {
    for (size_t i = 0; i < parts.size(); ++i) {
      SCOPED_TRACE("shard " + std::to_string(i));
      EXPECT_TRUE(outcomes[i].status.ok()) << outcomes[i].status.error_message();
      const Answer part = Assemble(outcomes[i]);
      EXPECT_THAT(part.faults, IsEmpty());
      EXPECT_TRUE(
          ResultBytesOfLayers(part) ==
          ResultBytesOfLayers(SliceAnswer(whole.open(), answer, parts[i].open().shard_group())));
      ASSERT_TRUE(part.summary.has_value());
      EXPECT_EQ(part.summary->input_bytes(), parts[i].total_bytes());
      EXPECT_EQ(part.summary->fingerprint(), answer.summary.value_or(v1::Summary()).fingerprint());
    }
  }

  // Opens rank `index` of `ranks` and waits until it was admitted.
  std::unique_ptr<Call> OpenRank(const v1::Open& open, uint32_t ranks, uint32_t index) {
    v1::Open rank = open;
    *rank.mutable_shard_group() = EvenShardGroup(open, ranks, index);
    return OpenRank(rank);
  }
  std::unique_ptr<Call> OpenRank(const v1::Open& open) {
    auto call = std::make_unique<Call>(channel());
    call->Send(OpenMessage(open));
    EXPECT_TRUE(call->WaitForOpened().has_value());
    return call;
  }
};

struct PromptKind {
  std::string name;
  std::string changes;
};

void PrintTo(const PromptKind& kind, std::ostream* out) { *out << kind.name; }

class RanksTest : public ShardGroupTest,
                  public ::testing::WithParamInterface<std::tuple<PromptKind, uint32_t>> {};

TEST_P(RanksTest, EachGetsItsSliceOfTheWholeAnswer) {
  Start();
  const auto& [kind, ranks] = GetParam();
  const PromptData whole(ShardOpen(kind.changes), 11);
  const Outcome outcome = Run(AllMessages(whole));
  ExpectSuccess(whole, outcome);
  const std::vector<PromptData> parts = SplitByRanks(whole, ranks);
  ExpectSlices(whole, Assemble(outcome), parts, RunRanks(parts));
}

INSTANTIATE_TEST_SUITE_P(
    , RanksTest,
    ::testing::Combine(
        ::testing::Values(
            PromptKind{"StructKv", "return_saliency: true return_centrality: true"},
            PromptKind{"TokenFirst", "layout: LAYOUT_TOKEN_HEAD_DIM window_lse: true"},
            PromptKind{"PerKvHead",
                       "return_saliency: true method { structkv { granularity: "
                       "GRANULARITY_PER_KV_HEAD pooling: POOLING_AVG } }"},
            PromptKind{"SnapKvTokenFirst",
                       "layout: LAYOUT_TOKEN_HEAD_DIM dtype: DTYPE_F32 method { snapkv {} }"},
            PromptKind{
                "GroupMax",
                "return_saliency: true method { snapkv { group_reduce: GROUP_REDUCE_MAX } }"},
            PromptKind{"WindowMax",
                       "return_saliency: true window_lse: true method { snapkv { window_reduce: "
                       "WINDOW_REDUCE_MAX } }"},
            PromptKind{"WindowSum",
                       "return_saliency: true return_centrality: true method { structkv { "
                       "window_reduce: WINDOW_REDUCE_SUM } }"},
            PromptKind{"GroupMean",
                       "return_saliency: true method { snapkv { group_reduce: GROUP_REDUCE_MEAN } "
                       "}"},
            PromptKind{"PyramidKv", "method { pyramidkv { kv_budget { ratio: 0.3 } } }"},
            PromptKind{"FastKv", "method { fastkv { tsp_layer: 2 } }"},
            PromptKind{"GemFilter", "output: OUTPUT_PLAN method { gemfilter { filter_layer: 3 } }"},
            PromptKind{"GivenSaliency", "statistic: STATISTIC_SALIENCY return_saliency: true"},
            PromptKind{"GivenPerKvHead",
                       "statistic: STATISTIC_SALIENCY_PER_KV_HEAD return_saliency: true method { "
                       "structkv { granularity: GRANULARITY_PER_KV_HEAD } }"},
            PromptKind{"H2o", "method { h2o {} }"},
            PromptKind{"Plan", "output: OUTPUT_PLAN return_centrality: true"},
            PromptKind{"StreamingLlmPlan", "output: OUTPUT_PLAN method { streaming_llm {} }"},
            PromptKind{"Full", "layout: LAYOUT_TOKEN_HEAD_DIM method { full {} }"}),
        ::testing::Values(1, 2, 4, 8)),
    [](const auto& instance) {
      return std::get<0>(instance.param).name + "_" + std::to_string(std::get<1>(instance.param));
    });

// Ranks that share nothing but the prompt's length of heads: uneven, one KV head shared by two.
TEST_F(ShardGroupTest, UnevenRanks) {
  Start();
  const PromptData whole(ShardOpen("layout: LAYOUT_TOKEN_HEAD_DIM"), 11);
  const Outcome outcome = Run(AllMessages(whole));
  std::vector<PromptData> parts(3, whole);
  const char* groups[] = {
      "shard_index: 0 kv_heads { begin: 1 count: 3 } query_heads { begin: 2 count: 6 }",
      "shard_index: 1 kv_heads { begin: 0 count: 1 } query_heads { begin: 1 count: 1 }",
      "shard_index: 2 kv_heads { begin: 0 count: 1 } query_heads { begin: 0 count: 1 }"};
  for (size_t i = 0; i < 3; ++i) {
    v1::ShardGroup group;
    ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(
        std::string("group_id: 'uneven' shard_count: 3 ") + groups[i], &group));
    parts[i].KeepHeads(group, /*sharers=*/1);
  }
  ExpectSlices(whole, Assemble(outcome), parts, RunRanks(parts));
}

// Heads need not be named where they divide evenly.
TEST_F(ShardGroupTest, HeadsAreTheEvenShareByDefault) {
  Start();
  for (const uint32_t ranks : {2U, 8U}) {
    const PromptData whole(ShardOpen(), 11);
    const Outcome outcome = Run(AllMessages(whole));
    const std::vector<PromptData> parts = SplitByRanks(whole, ranks);
    const std::vector<Outcome> outcomes = Together(ranks, [&](size_t i) {
      std::vector<v1::CompressRequest> messages = AllMessages(parts[i]);
      messages[0].mutable_open()->mutable_shard_group()->clear_kv_heads();
      messages[0].mutable_open()->mutable_shard_group()->clear_query_heads();
      return testkit::Run(channel(), messages);
    });
    ExpectSlices(whole, Assemble(outcome), parts, outcomes);
  }
}

// One rank's layers come in another order than the other's; the answers do not tell.
TEST_F(ShardGroupTest, LayersInAnyOrder) {
  Start();
  const PromptData whole(ShardOpen("layers_in_flight: 3 return_centrality: true"), 11);
  const Outcome outcome = Run(AllMessages(whole));
  const std::vector<PromptData> parts = SplitByRanks(whole, 2);
  const std::vector<uint32_t> orders[] = {{2, 1, 0, 5, 3, 4}, {1, 0, 2, 3, 4, 5}};
  const std::vector<Outcome> outcomes = Together(2, [&](size_t i) {
    std::vector<v1::CompressRequest> messages = {OpenMessage(parts[i].open())};
    for (const uint32_t layer : orders[i]) messages.push_back(LayerMessage(parts[i], layer));
    messages.push_back(CommitMessage(parts[i]));
    return testkit::Run(channel(), messages);
  });
  ExpectSlices(whole, Assemble(outcome), parts, outcomes);
  EXPECT_EQ(Assemble(outcomes[0]).order, Assemble(outcomes[1]).order);
}

// A rank that runs ahead is held at its layers in flight, without its results, until the other
// comes.
TEST_F(ShardGroupTest, TheFastRankWaitsForTheSlowOne) {
  Start();
  const PromptData whole(ShardOpen(), 11);
  const Outcome outcome = Run(AllMessages(whole));
  const std::vector<PromptData> parts = SplitByRanks(whole, 2);
  const auto fast = OpenRank(parts[0].open());
  const auto slow = OpenRank(parts[1].open());
  std::thread ahead([&] {
    for (uint32_t layer = 0; layer < 6; ++layer) fast->Send(LayerMessage(parts[0], layer));
    fast->Send(CommitMessage(parts[0]));
    fast->HalfClose();
  });
  for (uint32_t layer = 0; layer < 6; ++layer) {
    slow->Send(LayerMessage(parts[1], layer));
    EXPECT_TRUE(slow->WaitForLayer(layer));
    EXPECT_TRUE(fast->WaitForLayer(layer));
  }
  slow->Send(CommitMessage(parts[1]));
  slow->HalfClose();
  ahead.join();
  ExpectSlices(whole, Assemble(outcome), parts, {fast->Finish(), slow->Finish()});
}

class SkeletonRanksTest : public ShardGroupTest,
                          public ::testing::WithParamInterface<std::tuple<v1::Layout, uint32_t>> {};

// Past the pivot the ranks send the skeleton's rows alone.
TEST_P(SkeletonRanksTest, MatchTheWhole) {
  Start();
  const auto& [layout, ranks] = GetParam();
  v1::Open open = ShardOpen(
      "return_saliency: true window_lse: true "
      "method { structkv { pivot { mode: PIVOT_MODE_FIXED fixed_layer: 2 } } }");
  open.set_layout(layout);
  PromptData whole(open, 11);
  const Answer full = Assemble(Run(AllMessages(whole)));
  ASSERT_TRUE(full.pivot.has_value());
  const std::vector<int32_t> skeleton =
      AsInts(full.pivot->tensors.at(v1::TENSOR_SKELETON_POSITIONS));
  for (uint32_t layer = 3; layer < 6; ++layer) whole.KeepRows(layer, skeleton);
  const auto in_steps = [&](const PromptData& data) {
    Call call(channel());
    call.Send(OpenMessage(data.open()));
    for (uint32_t layer = 0; layer < 6; ++layer) {
      call.Send(LayerMessage(data, layer));
      EXPECT_TRUE(call.WaitForLayer(layer));
    }
    call.Send(CommitMessage(data));
    call.HalfClose();
    return call.Finish();
  };
  const Outcome outcome = in_steps(whole);
  ExpectSuccess(whole, outcome);
  const std::vector<PromptData> parts = SplitByRanks(whole, ranks);
  ExpectSlices(whole, Assemble(outcome), parts,
               Together(ranks, [&](size_t i) { return in_steps(parts[i]); }));
}

INSTANTIATE_TEST_SUITE_P(, SkeletonRanksTest,
                         ::testing::Combine(::testing::Values(v1::LAYOUT_HEAD_TOKEN_DIM,
                                                              v1::LAYOUT_TOKEN_HEAD_DIM),
                                            ::testing::Values(2, 8)));

// Each rank is asked for the rows of its own heads.
TEST_F(ShardGroupTest, RowsMayBePulled) {
  Start();
  for (const char* changes : {"layout: LAYOUT_TOKEN_HEAD_DIM",
                              "method { structkv { granularity: GRANULARITY_PER_KV_HEAD } }"}) {
    const PromptData whole(ShardOpen(changes), 11);
    const Answer answer = Assemble(Run(AllMessages(whole)));
    for (const uint32_t ranks : {2U, 8U}) {
      const std::vector<PromptData> parts = SplitByRanks(whole, ranks);
      const std::vector<Outcome> outcomes = Together(ranks, [&](size_t i) {
        return RunWithPull(channel(), parts[i], v1::PULL_VALUES, /*layers_in_flight=*/2);
      });
      for (uint32_t i = 0; i < ranks; ++i) {
        EXPECT_TRUE(outcomes[i].status.ok()) << outcomes[i].status.error_message();
        EXPECT_TRUE(
            ResultBytesOfLayers(Assemble(outcomes[i])) ==
            ResultBytesOfLayers(SliceAnswer(whole.open(), answer, parts[i].open().shard_group())))
            << "shard " << i << " of " << ranks;
      }
    }
  }
}

TEST_F(ShardGroupTest, RowsAreArrangedForDecodeRanks) {
  Start();
  const PromptData whole(ShardOpen("layout: LAYOUT_TOKEN_HEAD_DIM"), 11);
  const Answer answer = Assemble(Run(AllMessages(whole)));
  // One stream of all heads, for two decode ranks of two KV heads.
  v1::Open open = whole.open();
  open.mutable_shard_group()->set_shard_count(1);
  open.mutable_shard_group()->set_decode_shard_count(2);
  PromptData arranged = whole;
  arranged.set_shard_group(open.shard_group());
  const Answer part = Assemble(Run(AllMessages(arranged)));
  EXPECT_THAT(part.faults, IsEmpty());
  ASSERT_EQ(part.layers.size(), 6U);
  for (const auto& [index, layer] : part.layers) {
    const LayerAnswer& plain = answer.layers.at(index);
    for (const v1::Tensor tensor : {v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
      std::string expected;
      for (const uint32_t begin : {0U, 2U}) {
        v1::HeadRange heads;
        heads.set_begin(begin);
        heads.set_count(2);
        expected += SliceHeads(plain.tensors.at(tensor), plain.kept_tokens, 4, heads);
      }
      EXPECT_TRUE(layer.tensors.at(tensor) == expected) << "layer " << index;
    }
  }
}

TEST_F(ShardGroupTest, RanksReserveTheirShares) {
  StartAlone(TestOptions());
  const v1::Open open = ShardOpen("prompt_tokens: 20000");
  const auto alone = OpenRank(open);
  const int64_t all = server().sessions().budget().reserved_bytes();
  alone->Cancel();
  alone->Finish();
  ExpectNothingHeld();
  std::vector<std::unique_ptr<Call>> calls;
  for (uint32_t i = 0; i < 4; ++i) calls.push_back(OpenRank(open, 4, i));
  const int64_t message = TestOptions().streams.max_message_bytes;  // one for each stream
  const int64_t shares = server().sessions().budget().reserved_bytes() - 3 * message;
  EXPECT_GE(shares, all);
  EXPECT_LT(shares, all + all / 4);
  for (auto& call : calls) call->Cancel();
  for (auto& call : calls) EXPECT_FALSE(call->Finish().status.ok());
}

// Faults

// Opens rank 0 of two as `first`, then rank 1 as `second`; both must fail with the texts.
class BadGroupTest : public ShardGroupTest {
 protected:
  void ExpectBothRefused(const v1::Open& first, const v1::Open& second,
                         const std::vector<std::string>& texts) {
    Start();
    const auto waiting = OpenRank(first);
    ExpectFailure(Run({OpenMessage(second)}), grpc::StatusCode::INVALID_ARGUMENT, texts);
    ExpectFailure(waiting->Finish(), grpc::StatusCode::INVALID_ARGUMENT, texts);
    ExpectMemoryBack();
  }

  static v1::Open Rank(uint32_t ranks, uint32_t index) {
    v1::Open open = ShardOpen();
    *open.mutable_shard_group() = EvenShardGroup(open, ranks, index);
    return open;
  }
};

TEST_F(BadGroupTest, DisagreeingLengths) {
  v1::Open second = Rank(2, 1);
  second.set_prompt_tokens(211);
  ExpectBothRefused(Rank(2, 0), second,
                    {"open.prompt_tokens is 211 of shard 1 and 210 of shard 0", "'group'"});
}

TEST_F(BadGroupTest, DisagreeingParameters) {
  v1::Open second = Rank(2, 1);
  second.mutable_method()->mutable_structkv()->set_decay(0.5);
  ExpectBothRefused(Rank(2, 0), second,
                    {"open.method.structkv.decay is 0.5 of shard 1 and 0.9 of shard 0"});
}

TEST_F(BadGroupTest, DisagreeingModels) {
  v1::Open second = Rank(2, 1);
  second.clear_model_id();
  ExpectBothRefused(Rank(2, 0), second,
                    {"open.model_id is unset of shard 1 and \"synthetic\" of shard 0"});
}

TEST_F(BadGroupTest, DisagreeingCounts) {
  ExpectBothRefused(Rank(2, 0), Rank(4, 1),
                    {"open.shard_group.shard_count is 4 of shard 1 and 2 of shard 0"});
}

TEST_F(BadGroupTest, TheSameIndexTwice) {
  ExpectBothRefused(Rank(2, 0), Rank(2, 0),
                    {"open.shard_group.shard_index is 0, which has joined", "'group'"});
}

TEST_F(BadGroupTest, OverlappingHeads) {
  v1::Open second = Rank(2, 1);
  second.mutable_shard_group()->mutable_kv_heads()->set_begin(1);
  second.mutable_shard_group()->mutable_query_heads()->set_begin(2);
  ExpectBothRefused(Rank(2, 0), second,
                    {"open.shard_group.query_heads", "shard 0 are [0, 4)", "shard 1 [2, 6)"});
}

TEST_F(BadGroupTest, MissingHeads) {
  v1::Open second = Rank(2, 1);
  second.mutable_shard_group()->mutable_kv_heads()->set_count(1);
  second.mutable_shard_group()->mutable_query_heads()->set_count(2);
  ExpectBothRefused(Rank(2, 0), second, {"open.shard_group.query_heads [6, 8) of the model's 8"});
}

// What a default means does not make a disagreement.
TEST_F(BadGroupTest, DefaultsAreTheirValues) {
  Start();
  PromptData whole(ShardOpen(), 11);
  const Answer answer = Assemble(Run(AllMessages(whole)));
  const std::vector<PromptData> parts = SplitByRanks(whole, 2);
  const std::vector<Outcome> outcomes = Together(2, [&](size_t i) {
    std::vector<v1::CompressRequest> messages = AllMessages(parts[i]);
    if (i == 1) {
      v1::Open& open = *messages[0].mutable_open();
      open.mutable_method()->mutable_structkv()->set_window_tokens(8);
      open.set_statistic(v1::STATISTIC_WINDOW_QUERIES);
      open.set_output(v1::OUTPUT_COMPACT);
      open.set_layers_in_flight(2);
      open.set_max_response_message_bytes(100000);
      open.set_idempotency_key("mine alone");
    }
    return testkit::Run(channel(), messages);
  });
  ExpectSlices(whole, answer, parts, outcomes);
}

struct BadShard {
  std::string name;
  std::string group;
  std::vector<std::string> texts;
};

void PrintTo(const BadShard& bad, std::ostream* out) { *out << bad.name; }

class BadShardTest : public ShardGroupTest, public ::testing::WithParamInterface<BadShard> {};

TEST_P(BadShardTest, IsRefusedAtOpen) {
  Start();
  v1::Open open = ShardOpen();
  ASSERT_TRUE(
      google::protobuf::TextFormat::ParseFromString(GetParam().group, open.mutable_shard_group()));
  std::vector<std::string> texts = GetParam().texts;
  texts.emplace_back("open.shard_group");
  ExpectFailure(Run({OpenMessage(open)}), grpc::StatusCode::INVALID_ARGUMENT, texts);
  ExpectMemoryBack();
}

INSTANTIATE_TEST_SUITE_P(
    , BadShardTest,
    ::testing::Values(
        BadShard{"NoCount", "group_id: 'g'", {"shard_count is 0"}},
        BadShard{"TooMany",
                 "group_id: 'g' shard_count: 16 kv_heads { count: 1 } query_heads { "
                 "count: 1 }",
                 {"shard_count is 16", "query_head_count (8)"}},
        BadShard{
            "IndexPastTheEnd", "group_id: 'g' shard_count: 2 shard_index: 2", {"shard_index is 2"}},
        BadShard{"Nameless", "shard_count: 2", {"group_id is empty"}},
        BadShard{"LongName",
                 "shard_count: 2 group_id: '" + std::string(129, 'g') + "'",
                 {"129 bytes", "128"}},
        BadShard{"Uneven", "group_id: 'g' shard_count: 3", {"3 shards do not divide"}},
        BadShard{"OneRangeAlone",
                 "group_id: 'g' shard_count: 2 kv_heads { count: 2 }",
                 {"kv_heads alone"}},
        BadShard{"PastTheModel",
                 "group_id: 'g' shard_count: 2 kv_heads { begin: 3 count: 2 } "
                 "query_heads { begin: 6 count: 4 }",
                 {"kv_heads are [3, 5)", "the model's 4"}},
        BadShard{"Huge",
                 "group_id: 'g' shard_count: 2 kv_heads { begin: 4294967295 count: 4294967295 } "
                 "query_heads { begin: 4294967295 count: 4294967295 }",
                 {"kv_heads are [4294967295, 8589934590)"}},
        BadShard{"OtherQueryHeads",
                 "group_id: 'g' shard_count: 2 kv_heads { count: 2 } "
                 "query_heads { begin: 4 count: 4 }",
                 {"query_heads are [4, 8)", "[0, 4)"}},
        BadShard{"DecodeRanksThatDoNotDivide",
                 "group_id: 'g' shard_count: 2 decode_shard_count: 3",
                 {"decode_shard_count", "3"}}),
    [](const auto& instance) { return instance.param.name; });

// A running group has no place for another rank, and does not notice one that asks.
TEST_F(ShardGroupTest, ARunningGroupIsNotDisturbed) {
  Start();
  const PromptData whole(ShardOpen(), 11);
  const Answer answer = Assemble(Run(AllMessages(whole)));
  const std::vector<PromptData> parts = SplitByRanks(whole, 2);
  const auto zero = OpenRank(parts[0].open());
  const auto one = OpenRank(parts[1].open());
  ExpectFailure(Run({OpenMessage(parts[0].open())}), grpc::StatusCode::INVALID_ARGUMENT,
                {"shard_index is 0, which has joined the group 'group' already"});
  for (uint32_t layer = 0; layer < 6; ++layer) {
    zero->Send(LayerMessage(parts[0], layer));
    one->Send(LayerMessage(parts[1], layer));
    EXPECT_TRUE(one->WaitForLayer(layer));
  }
  for (const auto& [call, part] : {std::pair(&zero, &parts[0]), std::pair(&one, &parts[1])}) {
    (*call)->Send(CommitMessage(*part));
    (*call)->HalfClose();
  }
  ExpectSlices(whole, answer, parts, {zero->Finish(), one->Finish()});
}

TEST_F(ShardGroupTest, AGroupThatNeverFillsEndsAtTheLimit) {
  ServerOptions options = TestOptions();
  options.streams.shard_group = absl::Milliseconds(150);
  Start(options);
  const v1::Open open = ShardOpen();
  const auto zero = OpenRank(open, 4, 0);
  const auto two = OpenRank(open, 4, 2);
  // What came already is held, and dropped in the end.
  const std::vector<PromptData> parts = SplitByRanks(PromptData(open, 11), 4);
  zero->Send(LayerMessage(parts[0], 0));
  for (const auto* call : {&zero, &two}) {
    ExpectFailure((*call)->Finish(), grpc::StatusCode::DEADLINE_EXCEEDED,
                  {"'group'", "150ms", "shards 1, 3 of 4"});
  }
  ExpectMemoryBack();
}

TEST_F(ShardGroupTest, RanksThatWaitForOneAnotherEndAtTheLimit) {
  ServerOptions options = TestOptions();
  options.streams.shard_group = absl::Milliseconds(500);
  Start(options);
  const std::vector<PromptData> parts =
      SplitByRanks(PromptData(ShardOpen("layers_in_flight: 2"), 11), 2);
  const auto zero = OpenRank(parts[0].open());
  const auto one = OpenRank(parts[1].open());
  zero->Send(LayerMessage(parts[0], 0));
  one->Send(LayerMessage(parts[1], 1));
  for (const auto* call : {&zero, &one}) {
    ExpectFailure((*call)->Finish(), grpc::StatusCode::DEADLINE_EXCEEDED,
                  {"'group'", "waited for one another", "500ms", "layer 0 lacks shard 1",
                   "layer 1 lacks shard 0"});
  }
  ExpectMemoryBack();
}

TEST_F(ShardGroupTest, ARankThatIsKilledEndsTheOthers) {
  Start();
  const PromptData whole(ShardOpen(), 11);
  const std::vector<PromptData> parts = SplitByRanks(whole, 4);
  std::vector<std::unique_ptr<Call>> calls;
  for (const PromptData& part : parts) calls.push_back(OpenRank(part.open()));
  for (size_t i = 0; i < 4; ++i) calls[i]->Send(LayerMessage(parts[i], 0));
  EXPECT_TRUE(calls[0]->WaitForLayer(0));
  for (size_t i = 0; i < 3; ++i) calls[i]->Send(LayerMessage(parts[i], 1));
  calls[3]->Cancel();
  EXPECT_EQ(calls[3]->Finish().status.error_code(), grpc::StatusCode::CANCELLED);
  for (size_t i = 0; i < 3; ++i) {
    ExpectFailure(calls[i]->Finish(), grpc::StatusCode::ABORTED,
                  {"shard 3 of the group 'group' ended: CANCELLED"});
  }
  ExpectMemoryBack();
}

TEST_F(ShardGroupTest, ARankThatIsKilledWhileTheGroupWaitsEndsTheOthers) {
  Start();
  const v1::Open open = ShardOpen();
  const auto zero = OpenRank(open, 4, 0);
  const auto one = OpenRank(open, 4, 1);
  one->Cancel();
  EXPECT_EQ(one->Finish().status.error_code(), grpc::StatusCode::CANCELLED);
  ExpectFailure(zero->Finish(), grpc::StatusCode::ABORTED, {"shard 1 of the group"});
  ExpectMemoryBack();
}

// The rank at fault gets its own status, the others learn whose it was.
TEST_F(ShardGroupTest, AFaultIsTheRanksOwn) {
  Start();
  const PromptData whole(ShardOpen(), 11);
  const std::vector<PromptData> parts = SplitByRanks(whole, 2);
  const auto zero = OpenRank(parts[0].open());
  const auto one = OpenRank(parts[1].open());
  v1::TensorPiece piece = MakePiece(parts[1], 0, v1::TENSOR_KEYS);
  piece.set_layer(9);
  one->Send(PieceMessage(std::move(piece)));
  ExpectFailure(one->Finish(), grpc::StatusCode::OUT_OF_RANGE, {"layer 9"});
  ExpectFailure(zero->Finish(), grpc::StatusCode::ABORTED,
                {"shard 1 of the group 'group' ended: OUT_OF_RANGE", "layer 9"});
  ExpectMemoryBack();
}

TEST_F(ShardGroupTest, ABadStatisticIsTheRanksOwn) {
  Start();
  const PromptData whole(ShardOpen("statistic: STATISTIC_SALIENCY_PER_KV_HEAD"), 11);
  std::vector<PromptData> parts = SplitByRanks(whole, 2);
  parts[1].mutable_tensor(0, v1::TENSOR_SALIENCY)->replace(0, 4, "\xff\xff\xff\xff", 4);  // NaN
  const auto zero = OpenRank(parts[0].open());
  const auto one = OpenRank(parts[1].open());
  zero->Send(LayerMessage(parts[0], 0));
  one->Send(LayerMessage(parts[1], 0));
  ExpectFailure(one->Finish(), grpc::StatusCode::INVALID_ARGUMENT,
                {"layer 0: saliency of token 0 (KV head 2) is nan"});
  ExpectFailure(zero->Finish(), grpc::StatusCode::ABORTED,
                {"shard 1 of the group 'group' ended: INVALID_ARGUMENT", "KV head 2"});
  ExpectMemoryBack();
}

TEST_F(ShardGroupTest, ALayerIsOfSkeletonRowsInAllRanksOrInNone) {
  Start();
  PromptData whole(ShardOpen("method { structkv { pivot { mode: PIVOT_MODE_FIXED fixed_layer: 0 "
                             "} } }"),
                   11);
  const std::vector<PromptData> full = SplitByRanks(whole, 2);
  const auto zero = OpenRank(full[0].open());
  const auto one = OpenRank(full[1].open());
  zero->Send(LayerMessage(full[0], 0));
  one->Send(LayerMessage(full[1], 0));
  ASSERT_TRUE(zero->WaitForLayer(0));
  ASSERT_TRUE(one->WaitForLayer(0));
  whole.KeepRows(1, one->Skeleton());
  const std::vector<PromptData> cut = SplitByRanks(whole, 2);
  zero->Send(LayerMessage(full[0], 1));
  one->Send(LayerMessage(cut[1], 1));
  for (const auto* call : {&zero, &one}) {
    ExpectFailure((*call)->Finish(), grpc::StatusCode::INVALID_ARGUMENT,
                  {"layer 1: shard 1 sent skeleton rows and shard 0 all tokens"});
  }
  ExpectMemoryBack();
}

// No rank has a summary before every rank has committed.
TEST_F(ShardGroupTest, ACommitThatDisagreesEndsAll) {
  Start();
  const PromptData whole(ShardOpen(), 11);
  const std::vector<PromptData> parts = SplitByRanks(whole, 2);
  const auto zero = OpenRank(parts[0].open());
  const auto one = OpenRank(parts[1].open());
  for (uint32_t layer = 0; layer < 6; ++layer) {
    zero->Send(LayerMessage(parts[0], layer));
    one->Send(LayerMessage(parts[1], layer));
    EXPECT_TRUE(zero->WaitForLayer(layer));
  }
  zero->Send(CommitMessage(parts[0]));
  zero->HalfClose();
  one->Send(CommitMessage(6, 1));
  ExpectFailure(one->Finish(), grpc::StatusCode::INVALID_ARGUMENT, {"commit.input_bytes is 1"});
  ExpectFailure(zero->Finish(), grpc::StatusCode::ABORTED, {"shard 1 of the group"});
  ExpectMemoryBack();
}

// A rank whose connection was lost comes again with its key, while the group still waits.
TEST_F(ShardGroupTest, ARankIsReplacedWhileTheGroupWaits) {
  Start();
  const PromptData whole(ShardOpen(), 11);
  const Answer answer = Assemble(Run(AllMessages(whole)));
  const std::vector<PromptData> parts = SplitByRanks(whole, 2);
  v1::Open keyed = parts[0].open();
  keyed.set_idempotency_key("rank 0");
  const auto lost = OpenRank(keyed);
  lost->Send(LayerMessage(parts[0], 0));
  const auto again = OpenRank(keyed);
  ExpectFailure(lost->Finish(), grpc::StatusCode::ABORTED, {"idempotency_key"});
  const auto one = OpenRank(parts[1].open());
  for (uint32_t layer = 0; layer < 6; ++layer) {
    again->Send(LayerMessage(parts[0], layer));
    one->Send(LayerMessage(parts[1], layer));
    EXPECT_TRUE(again->WaitForLayer(layer));
  }
  for (const auto& [call, part] : {std::pair(&again, &parts[0]), std::pair(&one, &parts[1])}) {
    (*call)->Send(CommitMessage(*part));
    (*call)->HalfClose();
  }
  ExpectSlices(whole, answer, parts, {again->Finish(), one->Finish()});
}

// A rank that finds no room may come again while the others wait.
TEST_F(ShardGroupTest, ARankWithoutRoomLeavesTheGroupWaiting) {
  const PromptData whole(ShardOpen(), 11);
  const std::vector<PromptData> parts = SplitByRanks(whole, 2);
  StartAlone(TestOptions());
  const Answer answer = Assemble(Run(AllMessages(whole)));
  ExpectNothingHeld();
  int64_t one_rank = 0;
  {
    const auto call = OpenRank(parts[0].open());
    one_rank = server().sessions().budget().reserved_bytes();
  }
  ServerOptions options = TestOptions();
  options.sessions.memory_budget_bytes = one_rank * 5 / 2;
  Restart(options);
  const auto other = OpenRank(SmallOpen(100));  // takes what two ranks leave, and more
  const auto zero = OpenRank(parts[0].open());
  const Outcome refused = Run({OpenMessage(parts[1].open())});
  ExpectFailure(refused, grpc::StatusCode::RESOURCE_EXHAUSTED, {"budget"});
  EXPECT_TRUE(refused.trailers.contains("grpc-retry-pushback-ms"));
  other->Cancel();
  other->Finish();
  ASSERT_TRUE(Eventually([&] { return server().sessions().active_sessions() == 1; }));
  const auto one = OpenRank(parts[1].open());
  for (uint32_t layer = 0; layer < 6; ++layer) {
    zero->Send(LayerMessage(parts[0], layer));
    one->Send(LayerMessage(parts[1], layer));
    EXPECT_TRUE(zero->WaitForLayer(layer));
  }
  for (const auto& [call, part] : {std::pair(&zero, &parts[0]), std::pair(&one, &parts[1])}) {
    (*call)->Send(CommitMessage(*part));
    (*call)->HalfClose();
  }
  ExpectSlices(whole, answer, parts, {zero->Finish(), one->Finish()});
}

TEST_F(ShardGroupTest, AGroupThatWaitsEndsWithTheServer) {
  StartAlone(TestOptions());
  const auto zero = OpenRank(ShardOpen(), 2, 0);
  EXPECT_TRUE(server().Drain(absl::Seconds(30)));
  ExpectFailure(zero->Finish(), grpc::StatusCode::UNAVAILABLE, {"draining"});
}

}  // namespace
}  // namespace structkv::testkit
