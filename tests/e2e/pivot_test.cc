// The pivot in mid-prefill: it comes before later layers are sent, and these may then be skeleton
// rows. What a worker makes of it, what it may get wrong, and what a model's profile remembers.
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

constexpr uint32_t kLayers = 12;

v1::Open PivotOpen(v1::PivotMode mode) {
  v1::Open open = SmallOpen(300);
  open.mutable_geometry()->set_layer_count(kLayers);
  v1::Pivot* pivot = open.mutable_method()->mutable_structkv()->mutable_pivot();
  pivot->set_mode(mode);
  if (mode == v1::PIVOT_MODE_FIXED) pivot->set_fixed_layer(4);
  if (mode == v1::PIVOT_MODE_ONLINE) pivot->set_deadline(0.5);
  return open;
}

class PivotTest : public ServiceTest {
 protected:
  // Sends `layer` and waits for its answer.
  static void SendLayer(Call& call, const PromptData& data, uint32_t layer) {
    call.Send(LayerMessage(data, layer));
    EXPECT_TRUE(call.WaitForLayer(layer)) << layer;
  }

  // Layer by layer; from where the oracle allows it, skeleton rows alone. The skeleton is the
  // server's own, as it came before the next layer was sent.
  Outcome SendCut(PromptData* data) {
    const Oracle oracle(*data);
    const uint32_t from = oracle.pivot->skeleton_from.value_or(kLayers);
    Call call(channel());
    call.Send(OpenMessage(data->open()));
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      if (layer >= from) {
        const std::vector<int32_t> skeleton = call.Skeleton();
        EXPECT_FALSE(skeleton.empty()) << "no pivot before layer " << layer;
        if (skeleton.empty()) break;
        data->KeepRows(layer, skeleton);
      }
      SendLayer(call, *data, layer);
    }
    call.Send(CommitMessage(*data));
    call.HalfClose();
    return call.Finish();
  }

  // The pivot of a prompt that is sent as a whole.
  v1::PivotDecision Pivot(const PromptData& data) {
    const Outcome outcome = Run(AllMessages(data));
    ExpectSuccess(data, outcome);
    const Answer answer = Assemble(outcome);
    return answer.pivot ? answer.pivot->decision : v1::PivotDecision();
  }
};

struct CutCase {
  std::string name;
  v1::PivotMode mode;
  v1::Statistic statistic;
  v1::Output output;
  v1::Layout layout;
  bool per_head;
  bool lse;
  double kv_ratio;
};

void PrintTo(const CutCase& cut, std::ostream* out) { *out << cut.name; }

class CutTest : public PivotTest, public ::testing::WithParamInterface<CutCase> {};

TEST_P(CutTest, SkeletonRowsMatchTheOracle) {
  const CutCase& cut = GetParam();
  Start();
  v1::Open open = PivotOpen(cut.mode);
  open.set_statistic(cut.statistic);
  open.set_output(cut.output);
  open.set_layout(cut.layout);
  open.set_window_lse(cut.lse);
  open.set_return_saliency(true);
  open.set_return_centrality(true);
  v1::StructKvMethod* method = open.mutable_method()->mutable_structkv();
  method->mutable_kv_budget()->set_ratio(cut.kv_ratio);
  if (cut.per_head) method->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
  PromptData data(open, 31);
  const uint64_t full_bytes = data.total_bytes();
  const Outcome outcome = SendCut(&data);
  ExpectSuccess(data, outcome);
  EXPECT_LT(data.total_bytes(), full_bytes);
  const Answer answer = Assemble(outcome);
  ASSERT_TRUE(answer.pivot);
  EXPECT_LT(answer.layers_before_pivot, kLayers - 1);
}

constexpr auto kQueries = v1::STATISTIC_WINDOW_QUERIES;
constexpr auto kHeadFirst = v1::LAYOUT_HEAD_TOKEN_DIM;
constexpr auto kTokenFirst = v1::LAYOUT_TOKEN_HEAD_DIM;
INSTANTIATE_TEST_SUITE_P(
    , CutTest,
    ::testing::Values(CutCase{"Online", v1::PIVOT_MODE_ONLINE, kQueries, v1::OUTPUT_COMPACT,
                              kHeadFirst, false, false, 0.1},
                      CutCase{"Fixed", v1::PIVOT_MODE_FIXED, kQueries, v1::OUTPUT_COMPACT,
                              kTokenFirst, false, false, 0.1},
                      CutCase{"ProfiledUnknown", v1::PIVOT_MODE_PROFILED, kQueries,
                              v1::OUTPUT_COMPACT, kTokenFirst, true, false, 0.1},
                      CutCase{"Plan", v1::PIVOT_MODE_FIXED, kQueries, v1::OUTPUT_PLAN, kHeadFirst,
                              false, false, 0.1},
                      CutCase{"WindowLse", v1::PIVOT_MODE_FIXED, kQueries, v1::OUTPUT_COMPACT,
                              kHeadFirst, true, true, 0.1},
                      CutCase{"Saliency", v1::PIVOT_MODE_FIXED, v1::STATISTIC_SALIENCY,
                              v1::OUTPUT_PLAN, kHeadFirst, false, false, 0.1},
                      CutCase{"SaliencyPerHead", v1::PIVOT_MODE_FIXED,
                              v1::STATISTIC_SALIENCY_PER_KV_HEAD, v1::OUTPUT_COMPACT, kHeadFirst,
                              true, false, 0.1},
                      CutCase{"KeepsAllOfTheSkeleton", v1::PIVOT_MODE_FIXED, kQueries,
                              v1::OUTPUT_COMPACT, kTokenFirst, false, false, 0.5}),
    [](const auto& instance) { return instance.param.name; });

// FastKV's pivot is its tsp_layer, whatever the layers before and after say.
struct FastKvCase {
  std::string name;
  uint32_t tsp_layer;
  std::string open;  // what else differs, as text
};

void PrintTo(const FastKvCase& fastkv, std::ostream* out) { *out << fastkv.name; }

class FastKvCutTest : public PivotTest, public ::testing::WithParamInterface<FastKvCase> {};

v1::Open FastKvOpen(uint32_t tsp_layer) {
  v1::Open open = SmallOpen(300);
  open.mutable_geometry()->set_layer_count(kLayers);
  open.mutable_method()->mutable_fastkv()->set_tsp_layer(tsp_layer);
  return open;
}

TEST_P(FastKvCutTest, SkeletonRowsMatchTheOracle) {
  const FastKvCase& fastkv = GetParam();
  Start();
  v1::Open open = FastKvOpen(fastkv.tsp_layer);
  v1::Open changes;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(fastkv.open, &changes));
  open.MergeFrom(changes);
  open.set_return_saliency(true);
  PromptData data(open, 31);
  const uint64_t full_bytes = data.total_bytes();
  const Outcome outcome = SendCut(&data);
  ExpectSuccess(data, outcome);
  EXPECT_LT(data.total_bytes(), full_bytes);
  const Answer answer = Assemble(outcome);
  ASSERT_TRUE(answer.pivot);
  EXPECT_EQ(answer.layers_before_pivot, fastkv.tsp_layer);
  EXPECT_EQ(answer.pivot->decision.skeleton_from_layer(), fastkv.tsp_layer + 1);
}

INSTANTIATE_TEST_SUITE_P(
    , FastKvCutTest,
    ::testing::Values(
        FastKvCase{"Default", 4, ""},
        FastKvCase{"FirstLayerPerLayerPlan", 0,
                   "output: OUTPUT_PLAN layout: LAYOUT_TOKEN_HEAD_DIM "
                   "method { fastkv { granularity: GRANULARITY_PER_LAYER } }"},
        FastKvCase{"SaliencyBeforeTheLast", kLayers - 2,
                   "statistic: STATISTIC_SALIENCY_PER_KV_HEAD layout: LAYOUT_TOKEN_HEAD_DIM"},
        FastKvCase{"WindowLse", 6, "window_lse: true dtype: DTYPE_F32"},
        // A layer's budget stays that of the whole prompt.
        FastKvCase{"KeepsMostOfTheSkeleton", 3, "method { fastkv { kv_budget { ratio: 0.17 } } }"},
        FastKvCase{"KeepsAllOfTheSkeleton", 3, "method { fastkv { kv_budget { ratio: 0.5 } } }"}),
    [](const auto& instance) { return instance.param.name; });

TEST_F(PivotTest, FastKvTakesSkeletonRowsPastItsLayerAlone) {
  Start();
  const auto refused = [&](uint32_t tsp_layer, uint32_t at, const std::string& text) {
    PromptData data(FastKvOpen(tsp_layer), 5);
    Call call(channel());
    call.Send(OpenMessage(data.open()));
    for (uint32_t layer = 0; layer < at; ++layer) SendLayer(call, data, layer);
    data.KeepRows(at, std::vector<int32_t>(60, 1));
    call.Send(LayerMessage(data, at));
    call.HalfClose();
    ExpectFailure(call.Finish(), grpc::StatusCode::INVALID_ARGUMENT,
                  {"layer " + std::to_string(at), "positions", text});
  };
  refused(4, 0, "not decided yet");
  refused(4, 4, "not decided yet");
  refused(4, 5, "differs from the skeleton's");
  refused(kLayers - 1, kLayers - 1, "not decided yet");
}

TEST_F(PivotTest, AWorkerMayIgnoreThePivotOrSendBoth) {
  Start();
  const PromptData full(PivotOpen(v1::PIVOT_MODE_FIXED), 5);
  ExpectSuccess(full, Run(AllMessages(full)));
  // Every other layer past the pivot in full.
  PromptData mixed(PivotOpen(v1::PIVOT_MODE_FIXED), 5);
  Call call(channel());
  call.Send(OpenMessage(mixed.open()));
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    if (layer > 4 && layer % 2 == 0) mixed.KeepRows(layer, call.Skeleton());
    SendLayer(call, mixed, layer);
  }
  call.Send(CommitMessage(mixed));
  call.HalfClose();
  ExpectSuccess(mixed, call.Finish());
}

TEST_F(PivotTest, ThePivotComesBeforeTheAnswerOfItsLayer) {
  Start();
  const PromptData data(PivotOpen(v1::PIVOT_MODE_ONLINE), 31);
  const Outcome outcome = Run(AllMessages(data));
  ExpectSuccess(data, outcome);
  const Answer answer = Assemble(outcome);
  ASSERT_TRUE(answer.pivot);
  EXPECT_EQ(answer.layers_before_pivot, answer.pivot->decision.decided_at_layer());
}

TEST_F(PivotTest, TheOrderOfArrivalLeavesNoTrace) {
  Start();
  v1::Open open = PivotOpen(v1::PIVOT_MODE_ONLINE);
  open.set_return_centrality(true);
  open.set_layers_in_flight(kLayers);
  const PromptData data(open, 31);
  const Outcome first = Run(AllMessages(data));
  ExpectSuccess(data, first);
  const std::string expected = ResultBytes(Assemble(first));
  Random random(9);
  for (int round = 0; round < 5; ++round) {
    std::vector<v1::CompressRequest> messages = AllMessages(data);
    for (size_t i = kLayers; i > 1; --i) {
      std::swap(messages[i], messages[1 + random.Between(0, static_cast<int64_t>(i) - 1)]);
    }
    EXPECT_TRUE(ResultBytes(Assemble(Run(messages))) == expected) << round;
  }
}

TEST_F(PivotTest, PositionsInPiecesAndAgain) {
  Start();
  PromptData data(PivotOpen(v1::PIVOT_MODE_FIXED), 5);
  Call call(channel());
  call.Send(OpenMessage(data.open()));
  for (uint32_t layer = 0; layer <= 4; ++layer) SendLayer(call, data, layer);
  for (uint32_t layer = 5; layer < kLayers; ++layer) data.KeepRows(layer, call.Skeleton());
  const uint64_t bytes = data.tensor(5, v1::TENSOR_POSITIONS).size();
  call.Send(PieceMessage(MakePiece(data, 5, v1::TENSOR_POSITIONS, 100, bytes - 100)));
  call.Send(PieceMessage(MakePiece(data, 5, v1::TENSOR_POSITIONS, 0, 99)));
  call.Send(PieceMessage(MakePiece(data, 5, v1::TENSOR_POSITIONS, 0, 99)));
  call.Send(PieceMessage(MakePiece(data, 5, v1::TENSOR_POSITIONS, 99, 1)));
  for (const v1::Tensor tensor : data.effective().tensors) {
    call.Send(PieceMessage(MakePiece(data, 5, tensor)));
  }
  EXPECT_TRUE(call.WaitForLayer(5));
  call.Send(PieceMessage(MakePiece(data, 5, v1::TENSOR_POSITIONS, 0, 99)));  // once more
  for (uint32_t layer = 6; layer < kLayers; ++layer) SendLayer(call, data, layer);
  call.Send(CommitMessage(data));
  call.HalfClose();
  ExpectSuccess(data, call.Finish());
}

// What is wrong with layer 5 or another, after layers 0 to 4 were answered and the pivot came.
struct WrongCase {
  std::string name;
  std::function<std::vector<v1::CompressRequest>(PromptData&, const std::vector<int32_t>&)> send;
  grpc::StatusCode code;
  std::vector<std::string> texts;
};

void PrintTo(const WrongCase& wrong, std::ostream* out) { *out << wrong.name; }

using Messages = std::vector<v1::CompressRequest>;
using Rows = std::vector<int32_t>;

// Layer 5 with other positions than the skeleton.
std::function<Messages(PromptData&, const Rows&)> With(std::function<void(Rows*)> change) {
  return [change = std::move(change)](PromptData& data, const Rows& skeleton) {
    Rows rows = skeleton;
    change(&rows);
    data.KeepRows(5, rows);
    return Messages{LayerMessage(data, 5)};
  };
}

std::vector<WrongCase> WrongCases() {
  constexpr auto kInvalid = grpc::StatusCode::INVALID_ARGUMENT;
  return {
      {"AnotherToken",
       With([](Rows* rows) { (*rows)[3] = (*rows)[3] + 1 == (*rows)[4] ? 0 : (*rows)[3] + 1; }),
       kInvalid,
       {"layer 5", "positions", "entry 3", "skeleton of 60"}},
      {"NotAscending",
       With([](Rows* rows) { std::swap((*rows)[0], (*rows)[1]); }),
       kInvalid,
       {"layer 5", "entry 0"}},
      {"Negative",
       [](PromptData& data, const Rows& skeleton) {
         data.KeepRows(5, skeleton);
         v1::TensorPiece piece = MakePiece(data, 5, v1::TENSOR_POSITIONS);
         for (int i = 0; i < 4; ++i) (*piece.mutable_data())[i] = static_cast<char>(0xff);
         return Messages{PieceMessage(piece)};
       },
       kInvalid,
       {"layer 5", "entry 0"}},
      {"OneTooFew",
       With([](Rows* rows) { rows->pop_back(); }),
       kInvalid,
       {"layer 5", "came before all of the layer's positions", "236 of 240"}},
      {"OneTooMany",
       With([](Rows* rows) { rows->push_back(299); }),
       kInvalid,
       {"layer 5", "positions", "240"}},
      {"KeysBeforeAllPositions",
       [](PromptData& data, const Rows& skeleton) {
         data.KeepRows(5, skeleton);
         return Messages{PieceMessage(MakePiece(data, 5, v1::TENSOR_POSITIONS, 0, 120)),
                         PieceMessage(MakePiece(data, 5, v1::TENSOR_KEYS))};
       },
       kInvalid,
       {"layer 5", "keys", "120 of 240"}},
      {"PositionsAfterKeys",
       [](PromptData& data, const Rows& skeleton) {
         data.KeepRows(5, skeleton);
         return Messages{PieceMessage(MakePiece(data, 5, v1::TENSOR_KEYS)),
                         PieceMessage(MakePiece(data, 5, v1::TENSOR_POSITIONS))};
       },
       kInvalid,
       {"layer 5", "positions", "after other pieces"}},
      {"AnAnsweredFullLayer",
       [](PromptData& data, const Rows& skeleton) {
         data.KeepRows(4, skeleton);
         return Messages{PieceMessage(MakePiece(data, 4, v1::TENSOR_POSITIONS))};
       },
       kInvalid,
       {"layer 4", "from layer 5 on"}},
      {"TooEarly",
       [](PromptData& data, const Rows& skeleton) {
         data.KeepRows(7, skeleton);
         return Messages{PieceMessage(MakePiece(data, 7, v1::TENSOR_POSITIONS))};
       },
       kInvalid,
       {"layer 7", "layers_in_flight"}},
      {"KeysOfAllTokens",
       [](PromptData& data, const Rows& skeleton) {
         PromptData cut = data;
         cut.KeepRows(5, skeleton);
         return Messages{PieceMessage(MakePiece(cut, 5, v1::TENSOR_POSITIONS)),
                         PieceMessage(MakePiece(data, 5, v1::TENSOR_KEYS))};
       },
       kInvalid,
       {"layer 5", "keys"}},
      {"AgainWithOtherBytes",
       [](PromptData& data, const Rows& skeleton) {
         data.KeepRows(5, skeleton);
         v1::TensorPiece piece = MakePiece(data, 5, v1::TENSOR_POSITIONS);
         Messages messages = {PieceMessage(piece)};
         (*piece.mutable_data())[0] ^= 1;
         messages.push_back(PieceMessage(piece));
         return messages;
       },
       grpc::StatusCode::ALREADY_EXISTS,
       {"layer 5", "positions"}},
      {"Checksum",
       [](PromptData& data, const Rows& skeleton) {
         data.KeepRows(5, skeleton);
         v1::TensorPiece piece = MakePiece(data, 5, v1::TENSOR_POSITIONS);
         piece.set_xxh3_64(1);
         return Messages{PieceMessage(piece)};
       },
       grpc::StatusCode::DATA_LOSS,
       {"layer 5", "positions"}},
      {"CommitOfFullLayersBytes",
       [](PromptData& data, const Rows& skeleton) {
         const uint64_t full = data.total_bytes();
         Messages messages;
         for (uint32_t layer = 5; layer < kLayers; ++layer) {
           data.KeepRows(layer, skeleton);
           messages.push_back(LayerMessage(data, layer));
         }
         messages.push_back(CommitMessage(kLayers, full));
         return messages;
       },
       kInvalid,
       {"commit.input_bytes"}},
      {"BadStatistic",
       [](PromptData& data, const Rows& skeleton) {
         data.KeepRows(5, skeleton);
         SetElement(v1::DTYPE_BF16, std::numeric_limits<float>::quiet_NaN(), 7 * 32,
                    data.mutable_tensor(5, v1::TENSOR_KEYS));
         return Messages{LayerMessage(data, 5)};
       },
       kInvalid,
       {"layer 5"}},
  };
}

class WrongRowsTest : public PivotTest, public ::testing::WithParamInterface<WrongCase> {};

TEST_P(WrongRowsTest, IsNamed) {
  Start();
  PromptData data(PivotOpen(v1::PIVOT_MODE_FIXED), 5);
  Call call(channel());
  call.Send(OpenMessage(data.open()));
  for (uint32_t layer = 0; layer <= 4; ++layer) SendLayer(call, data, layer);
  const Rows skeleton = call.Skeleton();
  ASSERT_EQ(skeleton.size(), 60U);
  for (const auto& message : GetParam().send(data, skeleton)) call.Send(message);
  call.HalfClose();
  ExpectFailure(call.Finish(), GetParam().code, GetParam().texts);
}

INSTANTIATE_TEST_SUITE_P(, WrongRowsTest, ::testing::ValuesIn(WrongCases()),
                         [](const auto& instance) { return instance.param.name; });

TEST_F(PivotTest, PositionsWithoutAPivotAreRefused) {
  Start();
  for (const v1::PivotMode mode : {v1::PIVOT_MODE_ONLINE, v1::PIVOT_MODE_EXACT}) {
    PromptData data(PivotOpen(mode), 5);
    data.KeepRows(0, Rows(60, 1));
    ExpectFailure(Run({OpenMessage(data.open()), LayerMessage(data, 0)}),
                  grpc::StatusCode::INVALID_ARGUMENT,
                  {"layer 0", "positions",
                   mode == v1::PIVOT_MODE_EXACT ? "after the last layer" : "not decided yet"});
  }
  v1::Open snapkv = SmallOpen(300);
  snapkv.mutable_method()->mutable_snapkv();
  PromptData data(snapkv, 5);
  data.KeepRows(0, Rows(60, 1));
  ExpectFailure(Run({OpenMessage(data.open()), LayerMessage(data, 0)}),
                grpc::StatusCode::INVALID_ARGUMENT, {"layer 0", "no skeleton"});
}

TEST_F(PivotTest, ProfiledLearnsFromEveryModeAndSurvivesARestart) {
  const TemporaryDirectory directory;
  ServerOptions options = TestOptions();
  options.pivot_profile = directory.Path("profile.json");
  StartAlone(options);
  v1::Open profiled = PivotOpen(v1::PIVOT_MODE_PROFILED);
  profiled.mutable_method()->mutable_structkv()->mutable_pivot()->set_profile_min_prompts(3);
  const PromptData unknown(profiled, 5);
  EXPECT_EQ(Pivot(unknown).mode(), v1::PIVOT_MODE_ONLINE);
  const v1::PivotDecision exact = Pivot(PromptData(PivotOpen(v1::PIVOT_MODE_EXACT), 5));
  // Layers of skeleton rows teach nothing.
  PromptData cut(PivotOpen(v1::PIVOT_MODE_FIXED), 5);
  ExpectSuccess(cut, SendCut(&cut));
  // Nor do methods whose one layer is given.
  Pivot(PromptData(FastKvOpen(4), 5));
  v1::Open gemfilter = FastKvOpen(4);
  gemfilter.mutable_method()->mutable_gemfilter()->set_filter_layer(4);
  gemfilter.set_output(v1::OUTPUT_PLAN);
  Pivot(PromptData(gemfilter, 5));
  EXPECT_EQ(Pivot(unknown).mode(), v1::PIVOT_MODE_ONLINE) << "two were seen";

  Restart(options);
  PromptData known(profiled, 5);
  known.profiled_layer = exact.pivot_layer();
  const v1::PivotDecision decision = Pivot(known);
  EXPECT_EQ(decision.mode(), v1::PIVOT_MODE_PROFILED);
  EXPECT_EQ(decision.profiled_prompts(), 3U);
  EXPECT_EQ(decision.pivot_layer(), exact.pivot_layer());
  // Another model is another one.
  profiled.set_model_id("other");
  EXPECT_EQ(Pivot(PromptData(profiled, 5)).mode(), v1::PIVOT_MODE_ONLINE);
  profiled.set_model_id("");
  ExpectFailure(Run({OpenMessage(profiled)}), grpc::StatusCode::INVALID_ARGUMENT,
                {"model_id", "PROFILED"});
}

}  // namespace
}  // namespace structkv::testkit
