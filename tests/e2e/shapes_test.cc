// Shapes of attention: every ratio of query to KV heads, values of another size than keys, values
// that are a part of the keys (MLA), and scores of the model's own scale.
#include <cmath>
#include <functional>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

struct Heads {
  std::string name;
  v1::DType dtype;
  uint32_t query_heads, kv_heads, key_dim, value_dim;
  bool values_in_keys = false;
};

void PrintTo(const Heads& heads, std::ostream* out) { *out << heads.name; }

struct Way {
  std::string name;
  std::function<void(v1::Open*)> set;
};

void PrintTo(const Way& way, std::ostream* out) { *out << way.name; }

v1::Open OpenOf(const Heads& heads, uint32_t tokens) {
  v1::Open open = SmallOpen(tokens);
  v1::ModelGeometry* geometry = open.mutable_geometry();
  geometry->set_query_head_count(heads.query_heads);
  geometry->set_kv_head_count(heads.kv_heads);
  geometry->set_key_dim(heads.key_dim);
  geometry->set_value_dim(heads.value_dim);
  geometry->set_values_in_keys(heads.values_in_keys);
  open.set_dtype(heads.dtype);
  return open;
}

std::vector<Way> Ways() {
  return {
      {"StructKv", [](v1::Open*) {}},
      {"StructKvPerHead",
       [](v1::Open* open) {
         open->mutable_method()->mutable_structkv()->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
         open->set_return_saliency(true);
         open->set_window_lse(true);
       }},
      {"SnapKvScaled",
       [](v1::Open* open) {
         open->mutable_method()->mutable_snapkv()->set_window_tokens(6);
         open->set_attention_scale(0.5);
       }},
      {"SnapKvGroupMaxScaled",
       [](v1::Open* open) {
         open->mutable_method()->mutable_snapkv()->set_group_reduce(v1::GROUP_REDUCE_MAX);
         open->set_attention_scale(0.03125);
         open->set_window_lse(true);
       }},
      {"StructKvKeepsAll",
       [](v1::Open* open) {
         open->mutable_method()->mutable_structkv()->mutable_kv_budget()->set_ratio(1);
       }},
      {"StreamingLlm", [](v1::Open* open) { open->mutable_method()->mutable_streaming_llm(); }},
      {"Full", [](v1::Open* open) { open->mutable_method()->mutable_full(); }},
      {"Plan", [](v1::Open* open) { open->set_output(v1::OUTPUT_PLAN); }},
  };
}

class HeadsTest : public ServiceTest,
                  public ::testing::WithParamInterface<std::tuple<Heads, Way, v1::Layout>> {};

TEST_P(HeadsTest, MatchesTheOracle) {
  StartAlone(TestOptions());
  const auto& [heads, way, layout] = GetParam();
  v1::Open open = OpenOf(heads, 90);
  open.mutable_geometry()->set_layer_count(3);
  open.set_layout(layout);
  way.set(&open);
  const PromptData data(open, 12);
  ExpectSuccess(data, Run(AllMessages(data)));
}

INSTANTIATE_TEST_SUITE_P(
    , HeadsTest,
    ::testing::Combine(::testing::Values(Heads{"Mha", v1::DTYPE_F32, 4, 4, 32, 32},
                                         Heads{"Gqa", v1::DTYPE_F16, 8, 2, 64, 32},
                                         Heads{"Mqa", v1::DTYPE_BF16, 6, 1, 32, 64},
                                         Heads{"Mla", v1::DTYPE_BF16, 4, 1, 576, 512, true},
                                         Heads{"MlaF32", v1::DTYPE_F32, 3, 1, 576, 512, true},
                                         Heads{"PartOfEachHead", v1::DTYPE_F16, 4, 2, 64, 32, true},
                                         Heads{"AllOfTheKeys", v1::DTYPE_F32, 4, 2, 32, 0, true}),
                       ::testing::ValuesIn(Ways()),
                       ::testing::Values(v1::LAYOUT_HEAD_TOKEN_DIM, v1::LAYOUT_TOKEN_HEAD_DIM)),
    [](const auto& instance) {
      return std::get<0>(instance.param).name + std::get<1>(instance.param).name +
             (std::get<2>(instance.param) == v1::LAYOUT_HEAD_TOKEN_DIM ? "HeadFirst"
                                                                       : "TokenFirst");
    });

const Heads kMla = {"Mla", v1::DTYPE_BF16, 4, 1, 576, 512, true};

// The same latent vectors with their values sent beside them: the same tokens, for nearly twice the
// bytes.
TEST_F(ServiceTest, ValuesInTheKeysAreSentAndReturnedOnce) {
  Start();
  v1::Open once = OpenOf(kMla, 130);
  once.set_attention_scale(1 / std::sqrt(192.0));
  v1::Open twice = once;
  twice.mutable_geometry()->set_values_in_keys(false);
  const PromptData view(once, 3);
  PromptData beside(twice, 3);
  for (uint32_t layer = 0; layer < beside.layers(); ++layer) {
    *beside.mutable_tensor(layer, v1::TENSOR_KEYS) = view.tensor(layer, v1::TENSOR_KEYS);
    *beside.mutable_tensor(layer, v1::TENSOR_WINDOW_QUERIES) =
        view.tensor(layer, v1::TENSOR_WINDOW_QUERIES);
  }
  const Outcome first = Run(AllMessages(view));
  const Outcome second = Run(AllMessages(beside));
  ExpectSuccess(view, first);
  ExpectSuccess(beside, second);
  const Answer a = Assemble(first);
  const Answer b = Assemble(second);
  for (uint32_t layer = 0; layer < view.layers(); ++layer) {
    for (const v1::Tensor tensor : {v1::TENSOR_POSITIONS, v1::TENSOR_KEYS}) {
      EXPECT_TRUE(a.layers.at(layer).tensors.at(tensor) == b.layers.at(layer).tensors.at(tensor));
    }
    EXPECT_EQ(b.layers.at(layer).tensors.at(v1::TENSOR_VALUES).size(), 13 * 512 * 2);
  }
  EXPECT_TRUE(a.summary->values_in_keys());
  EXPECT_FALSE(b.summary->values_in_keys());
  EXPECT_EQ(b.summary->input_bytes() - a.summary->input_bytes(), 4 * 130 * 512 * 2);
  EXPECT_EQ(b.summary->output_bytes() - a.summary->output_bytes(), 4 * 13 * 512 * 2);
  // Two layers of input and two of results, and what is recorded of the pieces of values.
  EXPECT_GT(b.opened->reserved_bytes() - a.opened->reserved_bytes(), 2 * (130 + 13) * 512 * 2);
  EXPECT_NE(a.opened->fingerprint(), b.opened->fingerprint());
}

TEST_F(ServiceTest, ValuesBesideTheKeysAreRefused) {
  Start();
  const PromptData data(OpenOf(kMla, 60), 4);
  v1::TensorPiece piece;
  piece.set_tensor(v1::TENSOR_VALUES);
  piece.set_data(std::string(64, 'v'));
  ExpectFailure(Run({OpenMessage(data.open()), PieceMessage(piece)}),
                grpc::StatusCode::INVALID_ARGUMENT, {"layer 0, values", "no such tensor"});
  ExpectMemoryBack();
}

TEST_F(ServiceTest, ValuesInTheKeysAreNotPulled) {
  Start();
  v1::Open open = OpenOf(kMla, 60);
  open.set_pull(v1::PULL_VALUES);
  ExpectFailure(Run({OpenMessage(open)}), grpc::StatusCode::INVALID_ARGUMENT,
                {"open.pull: VALUES, but values_in_keys"});
  ExpectMemoryBack();
}

// Scores that a scale has made too large for float32 are named, not taken.
TEST_F(ServiceTest, ScoresThatTheScaleMakesInfiniteAreRefused) {
  Start();
  v1::Open open = SmallOpen(60);
  open.set_attention_scale(3e38);
  const PromptData data(open, 4);
  ExpectFailure(Run(AllMessages(data)), grpc::StatusCode::INVALID_ARGUMENT,
                {"layer 0: saliency of token", "score"});
  ExpectMemoryBack();
}

}  // namespace
}  // namespace structkv::testkit
