// Keys and values of fp8: against the oracle in every type, layout and kind of scales, and what is
// refused.
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/send_cut.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

v1::Open Fp8Open(v1::DType dtype, v1::KvScales scales, uint32_t tokens = 110) {
  v1::Open open = SmallOpen(tokens);
  open.mutable_geometry()->set_value_dim(64);
  open.set_dtype(dtype);
  open.set_kv_scales(scales);
  return open;
}

struct Way {
  std::string name;
  std::function<void(v1::Open*)> set;
};

void PrintTo(const Way& way, std::ostream* out) { *out << way.name; }

std::vector<Way> Ways() {
  return {
      {"StructKv", [](v1::Open* open) { open->set_return_saliency(true); }},
      {"QueriesOfF32", [](v1::Open* open) { open->set_query_dtype(v1::DTYPE_F32); }},
      {"QueriesOfF16WithLse",
       [](v1::Open* open) {
         open->set_query_dtype(v1::DTYPE_F16);
         open->set_window_lse(true);
         open->set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
       }},
      {"SnapKv",
       [](v1::Open* open) {
         open->mutable_method()->mutable_snapkv();
         open->set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
         open->set_return_saliency(true);
       }},
      {"SnapKvGroupMax",
       [](v1::Open* open) {
         open->mutable_method()->mutable_snapkv()->set_group_reduce(v1::GROUP_REDUCE_MAX);
         open->set_attention_scale(0.25);
       }},
      {"GivenSaliency", [](v1::Open* open) { open->set_statistic(v1::STATISTIC_SALIENCY); }},
      {"Mla",
       [](v1::Open* open) {
         open->mutable_geometry()->set_layer_count(3);
         open->mutable_geometry()->set_kv_head_count(1);
         open->mutable_geometry()->set_key_dim(576);
         open->mutable_geometry()->set_value_dim(512);
         open->mutable_geometry()->set_values_in_keys(true);
         open->set_attention_scale(0.0721687);
       }},
      {"StreamingLlm", [](v1::Open* open) { open->mutable_method()->mutable_streaming_llm(); }},
      {"Full", [](v1::Open* open) { open->mutable_method()->mutable_full(); }},
      {"Plan", [](v1::Open* open) { open->set_output(v1::OUTPUT_PLAN); }},
      {"PlanOfGivenSaliency",
       [](v1::Open* open) {
         open->set_output(v1::OUTPUT_PLAN);
         open->set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
       }},
  };
}

const auto kTypes = ::testing::Values(v1::DTYPE_F8_E4M3, v1::DTYPE_F8_E5M2);
const auto kScales = ::testing::Values(v1::KV_SCALES_UNSPECIFIED, v1::KV_SCALES_PER_TENSOR,
                                       v1::KV_SCALES_PER_KV_HEAD);

class Fp8Test : public ServiceTest,
                public ::testing::WithParamInterface<std::tuple<Way, v1::DType, v1::KvScales>> {};

TEST_P(Fp8Test, MatchesTheOracle) {
  Start();
  const auto& [way, dtype, scales] = GetParam();
  v1::Open open = Fp8Open(dtype, scales);
  way.set(&open);
  const PromptData data(open, 41);
  ExpectSuccess(data, Run(AllMessages(data)));
}

INSTANTIATE_TEST_SUITE_P(, Fp8Test,
                         ::testing::Combine(::testing::ValuesIn(Ways()), kTypes, kScales),
                         [](const auto& instance) {
                           return std::get<0>(instance.param).name +
                                  v1::DType_Name(std::get<1>(instance.param)).substr(9) +
                                  std::to_string(std::get<2>(instance.param));
                         });

class Fp8CutTest : public ServiceTest, public ::testing::WithParamInterface<v1::KvScales> {};

TEST_P(Fp8CutTest, SkeletonRowsHaveScalesToo) {
  Start();
  v1::Open open = Fp8Open(v1::DTYPE_F8_E4M3, GetParam(), 200);
  v1::Pivot* pivot = open.mutable_method()->mutable_structkv()->mutable_pivot();
  pivot->set_mode(v1::PIVOT_MODE_FIXED);
  pivot->set_fixed_layer(1);
  PromptData data(open, 42);
  const Outcome outcome = SendCut(channel(), &data);
  EXPECT_FALSE(data.rows(3).empty());
  ExpectSuccess(data, outcome);
}

INSTANTIATE_TEST_SUITE_P(, Fp8CutTest, kScales);

// Equal scales are one scale, and scales of 1 are none.
TEST_F(ServiceTest, ScalesMeanTheSameHoweverTheyAreGiven) {
  Start();
  const auto positions = [&](v1::KvScales kind, float scale) {
    PromptData data(Fp8Open(v1::DTYPE_F8_E4M3, kind), 43);
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      for (const v1::Tensor tensor : {v1::TENSOR_KEY_SCALES, v1::TENSOR_VALUE_SCALES}) {
        std::string* scales = data.mutable_tensor(layer, tensor);
        for (size_t i = 0; i < scales->size() / 4; ++i) {
          SetElement(v1::DTYPE_F32, scale, i, scales);
        }
      }
    }
    const Outcome outcome = Run(AllMessages(data));
    ExpectSuccess(data, outcome);
    std::string all;
    for (const auto& [layer, answer] : Assemble(outcome).layers) {
      all += answer.tensors.at(v1::TENSOR_POSITIONS);
    }
    return all;
  };
  const std::string none = positions(v1::KV_SCALES_NONE, 1);
  EXPECT_TRUE(positions(v1::KV_SCALES_PER_TENSOR, 1) == none);
  EXPECT_TRUE(positions(v1::KV_SCALES_PER_KV_HEAD, 1) == none);
  const std::string large = positions(v1::KV_SCALES_PER_TENSOR, 4);
  EXPECT_TRUE(positions(v1::KV_SCALES_PER_KV_HEAD, 4) == large);
  EXPECT_FALSE(large == none) << "the scales of keys do not count";
}

struct BadScale {
  std::string name;
  v1::Tensor tensor;
  v1::KvScales kind;
  size_t index;
  float value;
  std::string text;
};

void PrintTo(const BadScale& bad, std::ostream* out) { *out << bad.name; }

class BadScaleTest : public ServiceTest, public ::testing::WithParamInterface<BadScale> {};

TEST_P(BadScaleTest, NamesLayerAndHead) {
  Start();
  const BadScale& bad = GetParam();
  // Nothing is scored: the caller would be the first to read them.
  for (const bool full : {false, true}) {
    v1::Open open = Fp8Open(v1::DTYPE_F8_E5M2, bad.kind);
    if (full) open.mutable_method()->mutable_full();
    PromptData data(open, 44);
    SetElement(v1::DTYPE_F32, bad.value, bad.index, data.mutable_tensor(2, bad.tensor));
    ExpectFailure(Run(AllMessages(data)), grpc::StatusCode::INVALID_ARGUMENT,
                  {"layer 2: " + bad.text, "finite number above 0"});
    ExpectMemoryBack();
  }
}

constexpr auto kPerHead = v1::KV_SCALES_PER_KV_HEAD;
constexpr auto kPerTensor = v1::KV_SCALES_PER_TENSOR;
INSTANTIATE_TEST_SUITE_P(
    , BadScaleTest,
    ::testing::Values(BadScale{"KeyNan", v1::TENSOR_KEY_SCALES, kPerHead, 1, kNan,
                               "key_scales: that of KV head 1 is nan"},
                      BadScale{"KeyZero", v1::TENSOR_KEY_SCALES, kPerHead, 0, 0,
                               "key_scales: that of KV head 0 is 0"},
                      BadScale{"KeyNegative", v1::TENSOR_KEY_SCALES, kPerTensor, 0, -0.5,
                               "key_scales: that of every KV head is -0.5"},
                      BadScale{"KeyInfinite", v1::TENSOR_KEY_SCALES, kPerTensor, 0, kInf,
                               "key_scales: that of every KV head is inf"},
                      BadScale{"ValueNan", v1::TENSOR_VALUE_SCALES, kPerTensor, 0, -kNan,
                               "value_scales: that of every KV head is nan"},
                      BadScale{"ValueZero", v1::TENSOR_VALUE_SCALES, kPerHead, 1, -0.0F,
                               "value_scales: that of KV head 1 is -0"},
                      BadScale{"ValueNegative", v1::TENSOR_VALUE_SCALES, kPerHead, 1, -3,
                               "value_scales: that of KV head 1 is -3"},
                      BadScale{"ValueInfinite", v1::TENSOR_VALUE_SCALES, kPerHead, 0, -kInf,
                               "value_scales: that of KV head 0 is -inf"}),
    [](const auto& instance) { return instance.param.name; });

// By its own KV head, also where the heads of a group are scored one by one.
TEST_F(ServiceTest, AKeyScaleThatOverflowsWithTheAttentionScaleIsNamed) {
  Start();
  for (const v1::GroupReduce reduce : {v1::GROUP_REDUCE_SUM, v1::GROUP_REDUCE_MAX}) {
    v1::Open open = Fp8Open(v1::DTYPE_F8_E4M3, kPerHead);
    open.mutable_method()->mutable_structkv()->set_group_reduce(reduce);
    open.set_attention_scale(4);
    PromptData data(open, 48);
    SetElement(v1::DTYPE_F32, 1e38F, 1, data.mutable_tensor(2, v1::TENSOR_KEY_SCALES));
    ExpectFailure(Run(AllMessages(data)), grpc::StatusCode::INVALID_ARGUMENT,
                  {"layer 2: key_scales: that of KV head 1 is 1e+38", "times attention_scale (4)"});
    ExpectMemoryBack();
  }
}

TEST_F(ServiceTest, AnotherCountOfScalesIsRefused) {
  Start();
  const PromptData data(Fp8Open(v1::DTYPE_F8_E4M3, kPerHead), 45);
  v1::TensorPiece many = MakePiece(data, 0, v1::TENSOR_KEY_SCALES);
  many.mutable_data()->append(4, '\1');
  ExpectFailure(Run({OpenMessage(data.open()), PieceMessage(many)}),
                grpc::StatusCode::INVALID_ARGUMENT,
                {"layer 0, key_scales", "12 bytes", "leaves the tensor, which has 8 bytes"});
  ExpectMemoryBack();
  std::vector<v1::CompressRequest> few = {OpenMessage(data.open())};
  for (uint32_t layer = 0; layer < data.layers(); ++layer) few.push_back(LayerMessage(data, layer));
  for (v1::TensorPiece& piece : *few.back().mutable_pieces()->mutable_pieces()) {
    if (piece.tensor() == v1::TENSOR_VALUE_SCALES) piece.mutable_data()->resize(4);
  }
  few.push_back(CommitMessage(data));
  ExpectFailure(Run(few), grpc::StatusCode::INVALID_ARGUMENT,
                {"layer 3, value_scales has 4 of 8 bytes"});
  ExpectMemoryBack();
}

TEST_F(ServiceTest, ScalesThatNobodyAskedForAreRefused) {
  Start();
  const PromptData data(Fp8Open(v1::DTYPE_F8_E4M3, v1::KV_SCALES_NONE), 46);
  v1::TensorPiece piece;
  piece.set_tensor(v1::TENSOR_KEY_SCALES);
  piece.set_data(std::string(4, '\1'));
  ExpectFailure(Run({OpenMessage(data.open()), PieceMessage(piece)}),
                grpc::StatusCode::INVALID_ARGUMENT, {"layer 0, key_scales", "no such tensor"});
}

TEST_F(ServiceTest, KeysThatAreNotFiniteAreNamed) {
  Start();
  for (const v1::DType dtype : {v1::DTYPE_F8_E4M3, v1::DTYPE_F8_E5M2}) {
    PromptData data(Fp8Open(dtype, kPerHead), 47);
    // KV head 1, token 33.
    SetElement(dtype, kNan, (110 + 33) * 32 + 5, data.mutable_tensor(1, v1::TENSOR_KEYS));
    ExpectFailure(Run(AllMessages(data)), grpc::StatusCode::INVALID_ARGUMENT,
                  {"layer 1: saliency of token 33 (KV head 1) is nan"});
    ExpectMemoryBack();
  }
}

struct BadType {
  std::string name;
  std::function<void(v1::Open*)> set;
  std::string text;
};

void PrintTo(const BadType& bad, std::ostream* out) { *out << bad.name; }

class BadTypeTest : public ServiceTest, public ::testing::WithParamInterface<BadType> {};

TEST_P(BadTypeTest, IsRefused) {
  Start();
  v1::Open open = SmallOpen();
  GetParam().set(&open);
  const Outcome outcome = Run({OpenMessage(open)});
  ExpectFailure(outcome, grpc::StatusCode::INVALID_ARGUMENT, {GetParam().text});
  EXPECT_THAT(outcome.responses, ::testing::IsEmpty());
}

INSTANTIATE_TEST_SUITE_P(
    , BadTypeTest,
    ::testing::Values(
        BadType{"QueriesOfFp8",
                [](v1::Open* open) {
                  open->set_dtype(v1::DTYPE_F8_E4M3);
                  open->set_query_dtype(v1::DTYPE_F8_E4M3);
                },
                "open.query_dtype: f8_e4m3 with keys of f8_e4m3; allowed is f32, f16 or bf16"},
        BadType{"QueriesOfFp8AndKeysOfBf16",
                [](v1::Open* open) { open->set_query_dtype(v1::DTYPE_F8_E5M2); },
                "open.query_dtype: f8_e5m2 with keys of bf16; allowed is bf16"},
        BadType{"QueriesOfAnotherType",
                [](v1::Open* open) { open->set_query_dtype(v1::DTYPE_F32); },
                "open.query_dtype: f32 with keys of bf16; allowed is bf16"},
        BadType{"UnknownQueries",
                [](v1::Open* open) { open->set_query_dtype(static_cast<v1::DType>(77)); },
                "open.query_dtype is 77"},
        BadType{"ScalesOfBf16",
                [](v1::Open* open) { open->set_kv_scales(v1::KV_SCALES_PER_TENSOR); },
                "open.kv_scales: PER_TENSOR is for fp8 keys and values, but dtype is bf16"},
        BadType{"UnknownScales",
                [](v1::Open* open) { open->set_kv_scales(static_cast<v1::KvScales>(9)); },
                "open.kv_scales is 9"}),
    [](const auto& instance) { return instance.param.name; });

}  // namespace
}  // namespace structkv::testkit
