// Keys that are turned to consecutive positions, over the real RPC.
#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

struct RotaryCase {
  std::string name;
  std::function<void(v1::Open*)> change;
};

void PrintTo(const RotaryCase& rotary_case, std::ostream* out) { *out << rotary_case.name; }

class RotaryTest : public ServiceTest, public ::testing::WithParamInterface<RotaryCase> {};

// The oracle turns every kept key itself: to the positions before Summary.next_position.
TEST_P(RotaryTest, MatchesTheOracle) {
  Start();
  v1::Open open = SmallOpen(300);
  open.mutable_rotary()->set_rope_theta(10000);
  GetParam().change(&open);
  const PromptData data(open, 41);
  const Outcome outcome = Run(AllMessages(data));
  ExpectSuccess(data, outcome);
  const Answer answer = Assemble(outcome);
  ASSERT_TRUE(answer.opened && answer.summary);
  EXPECT_EQ(answer.opened->rotary().rope_theta(), open.rotary().rope_theta());
  EXPECT_EQ(answer.summary->logical_length(), 300);
  EXPECT_EQ(answer.summary->next_position(), data.effective().largest);
}

std::vector<RotaryCase> Cases() {
  const auto dynamic = [](v1::Open* open) {
    open->mutable_rotary()->set_rope_type(v1::ROPE_TYPE_DYNAMIC);
    open->mutable_rotary()->set_factor(3);
    open->mutable_rotary()->set_max_position_embeddings(100);
  };
  return {
      {"Default", [](v1::Open*) {}},
      {"F32TokensFirst",
       [](v1::Open* open) {
         open->set_dtype(v1::DTYPE_F32);
         open->set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
       }},
      {"F16Interleaved",
       [](v1::Open* open) {
         open->set_dtype(v1::DTYPE_F16);
         open->mutable_rotary()->set_pairing(v1::ROTARY_PAIRING_INTERLEAVED);
       }},
      {"PerKvHead",
       [](v1::Open* open) {
         open->mutable_method()->mutable_snapkv();
         open->set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
       }},
      {"Linear",
       [](v1::Open* open) {
         open->mutable_rotary()->set_rope_type(v1::ROPE_TYPE_LINEAR);
         open->mutable_rotary()->set_factor(4);
       }},
      {"DynamicGrown", dynamic},
      {"DynamicGrownStill",
       [dynamic](v1::Open* open) {
         dynamic(open);
         open->mutable_method()->mutable_structkv()->mutable_kv_budget()->set_ratio(0.5);
       }},
      {"DynamicOfAllTokens",
       [dynamic](v1::Open* open) {
         dynamic(open);
         open->mutable_method()->mutable_full();
       }},
      {"Part",
       [](v1::Open* open) {
         open->mutable_geometry()->set_key_dim(64);
         open->mutable_rotary()->set_rotary_dim(24);
         open->mutable_rotary()->set_rotary_offset(32);
       }},
      {"StreamingLlm", [](v1::Open* open) { open->mutable_method()->mutable_streaming_llm(); }},
      // Layers keep different numbers of tokens; the last ones stand together in all of them.
      {"PyramidKv", [](v1::Open* open) { open->mutable_method()->mutable_pyramidkv(); }},
  };
}

INSTANTIATE_TEST_SUITE_P(, RotaryTest, ::testing::ValuesIn(Cases()),
                         [](const auto& instance) { return instance.param.name; });

class RotaryStreamTest : public ServiceTest {
 protected:
  static v1::Open Turned(v1::Open open) {
    open.mutable_rotary()->set_rope_theta(10000);
    return open;
  }
};

// The rows of a layer past the pivot are the skeleton's, but they stood where the prompt had them;
// also where the skeleton is smaller than the budget and kept whole.
TEST_F(RotaryStreamTest, TurnsSkeletonRowsFromTheirPlacesInThePrompt) {
  Start();
  for (const double ratio : {0.1, 0.5}) {
    v1::Open open = Turned(SmallOpen(300));
    v1::StructKvMethod* method = open.mutable_method()->mutable_structkv();
    method->mutable_kv_budget()->set_ratio(ratio);
    method->mutable_pivot()->set_mode(v1::PIVOT_MODE_FIXED);
    method->mutable_pivot()->set_fixed_layer(1);
    PromptData data(open, 43);
    Call call(channel());
    call.Send(OpenMessage(open));
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      if (layer > 1) data.KeepRows(layer, call.Skeleton());
      call.Send(LayerMessage(data, layer));
      ASSERT_TRUE(call.WaitForLayer(layer)) << layer;
    }
    call.Send(CommitMessage(data));
    call.HalfClose();
    ExpectSuccess(data, call.Finish());
  }
}

// A cache of turned keys is another cache, and so is one that was turned otherwise.
TEST_F(RotaryStreamTest, HasItsOwnFingerprint) {
  Start();
  std::vector<std::string> fingerprints;
  for (int i = 0; i < 4; ++i) {
    v1::Open open = SmallOpen();
    if (i > 0) open.mutable_rotary()->set_rope_theta(i == 1 ? 10000 : 20000);
    if (i == 3) open.mutable_rotary()->set_pairing(v1::ROTARY_PAIRING_INTERLEAVED);
    const PromptData data(open, 44);
    const Outcome outcome = Run(AllMessages(data));
    ExpectSuccess(data, outcome);
    const std::string fingerprint = Assemble(outcome).summary->fingerprint();
    EXPECT_THAT(fingerprints, ::testing::Not(::testing::Contains(fingerprint)));
    fingerprints.push_back(fingerprint);
  }
}

// Only the keys differ from those of a cache that keeps its rotation.
TEST_F(RotaryStreamTest, LeavesPositionsAndValuesAsTheyAre) {
  Start();
  const PromptData plain(SmallOpen(), 45);
  const PromptData turned(Turned(SmallOpen()), 45);
  const Answer a = Assemble(Run(AllMessages(plain)));
  const Answer b = Assemble(Run(AllMessages(turned)));
  ASSERT_EQ(a.layers.size(), 4);
  ASSERT_EQ(b.layers.size(), 4);
  for (const auto& [index, layer] : a.layers) {
    const LayerAnswer& other = b.layers.at(index);
    EXPECT_EQ(layer.tensors.at(v1::TENSOR_POSITIONS), other.tensors.at(v1::TENSOR_POSITIONS));
    EXPECT_EQ(layer.tensors.at(v1::TENSOR_VALUES), other.tensors.at(v1::TENSOR_VALUES));
    EXPECT_NE(layer.tensors.at(v1::TENSOR_KEYS), other.tensors.at(v1::TENSOR_KEYS));
  }
  EXPECT_EQ(a.summary->next_position(), 200);
  EXPECT_EQ(b.summary->next_position(), 20);
  EXPECT_EQ(b.summary->logical_length(), 200);
}

}  // namespace
}  // namespace structkv::testkit
