// Tensor pieces that do not fit: where they lie, what they are, and what is in them.
#include <cmath>
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using Messages = std::vector<v1::CompressRequest>;

// A prompt is opened, half of layer 0's keys is sent, and then what the case makes.
struct PieceCase {
  std::string name;
  std::function<Messages(const PromptData&)> make;
  grpc::StatusCode code;
  std::vector<std::string> texts;
};

void PrintTo(const PieceCase& piece_case, std::ostream* out) { *out << piece_case.name; }

class BadPieceTest : public ServiceTest, public ::testing::WithParamInterface<PieceCase> {};

constexpr uint64_t kHalf = 2 * 100 * 32 * 2;  // bytes of half of SmallOpen(200)'s keys

TEST_P(BadPieceTest, IsRefused) {
  Start();
  const PromptData data(SmallOpen(200), 1);
  Messages messages = {OpenMessage(data.open()),
                       PieceMessage(MakePiece(data, 0, v1::TENSOR_KEYS, 0, kHalf))};
  for (v1::CompressRequest& message : GetParam().make(data)) messages.push_back(std::move(message));
  // What would make the prompt complete, were the case not refused.
  for (uint32_t layer = 0; layer < data.layers(); ++layer) {
    messages.push_back(LayerMessage(data, layer));
  }
  messages.push_back(CommitMessage(data));
  ExpectFailure(Run(messages), GetParam().code, GetParam().texts);
}

// One piece, changed.
PieceCase Piece(const std::string& name, std::function<void(v1::TensorPiece*)> change,
                grpc::StatusCode code, std::vector<std::string> texts) {
  return {name,
          [=](const PromptData& data) {
            v1::TensorPiece piece = MakePiece(data, 0, v1::TENSOR_KEYS, kHalf, 64);
            change(&piece);
            return Messages{PieceMessage(piece)};
          },
          code, std::move(texts)};
}

std::vector<PieceCase> Cases() {
  constexpr auto kInvalid = grpc::StatusCode::INVALID_ARGUMENT;
  constexpr auto kOutOfRange = grpc::StatusCode::OUT_OF_RANGE;
  constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
  using P = v1::TensorPiece;
  return {
      Piece("LayerPastTheEnd", [](P* p) { p->set_layer(4); }, kOutOfRange, {"layer", "4"}),
      Piece("LastLayerNumber", [](P* p) { p->set_layer(0xffffffff); }, kOutOfRange, {"layer"}),
      Piece("LayerPastTheWindow", [](P* p) { p->set_layer(2); }, kInvalid, {"layer", "2"}),
      Piece("NoTensor", [](P* p) { p->set_tensor(v1::TENSOR_UNSPECIFIED); }, kInvalid, {"tensor"}),
      Piece("UnknownTensor", [](P* p) { p->set_tensor(static_cast<v1::Tensor>(99)); }, kInvalid,
            {"tensor", "99"}),
      Piece("NegativeTensor", [](P* p) { p->set_tensor(static_cast<v1::Tensor>(-1)); }, kInvalid,
            {"tensor"}),
      Piece("ServersTensor", [](P* p) { p->set_tensor(v1::TENSOR_CENTRALITY); }, kInvalid,
            {"tensor"}),
      Piece("SkeletonRowsWithExact", [](P* p) { p->set_tensor(v1::TENSOR_POSITIONS); }, kInvalid,
            {"layer 0", "positions", "full layers alone"}),
      Piece("SaliencyNotAskedFor", [](P* p) { p->set_tensor(v1::TENSOR_SALIENCY); }, kInvalid,
            {"saliency"}),
      Piece("LseNotAskedFor", [](P* p) { p->set_tensor(v1::TENSOR_WINDOW_LSE); }, kInvalid,
            {"lse"}),
      Piece("EmptyData", [](P* p) { p->set_data(""); }, kInvalid, {"data"}),
      Piece("NoSource", [](P* p) { p->clear_source(); }, kInvalid, {"data"}),
      Piece("AtTheEnd", [](P* p) { p->set_offset_bytes(2 * kHalf); }, kInvalid, {"keys", "25600"}),
      Piece("AcrossTheEnd", [](P* p) { p->set_offset_bytes(2 * kHalf - 63); }, kInvalid,
            {"keys", "25600"}),
      Piece("BeyondTheEnd", [](P* p) { p->set_offset_bytes(1 << 30); }, kInvalid, {"keys"}),
      Piece("OffsetOverflows", [](P* p) { p->set_offset_bytes(kMax - 63); }, kInvalid, {"keys"}),
      Piece("LastOffset", [](P* p) { p->set_offset_bytes(kMax); }, kInvalid, {"keys"}),
      Piece("NegativeOffset", [](P* p) { p->set_offset_bytes(uint64_t{1} << 63); }, kInvalid,
            {"keys"}),
      Piece("OverlapsTheEndOfAnother", [](P* p) { p->set_offset_bytes(kHalf - 32); }, kInvalid,
            {"keys", "overlap"}),
      Piece("WrongChecksum", [](P* p) { p->set_xxh3_64(1); }, grpc::StatusCode::DATA_LOSS,
            {"keys", "layer 0", "xxh3"}),
      {"OverlapsTwo",
       [](const PromptData& data) {
         return Messages{PieceMessage(MakePiece(data, 0, v1::TENSOR_KEYS, kHalf + 64, 64)),
                         PieceMessage(MakePiece(data, 0, v1::TENSOR_KEYS, kHalf, 128))};
       },
       kInvalid,
       {"keys", "overlap"}},
      {"LiesInAnother",
       [](const PromptData& data) {
         return Messages{PieceMessage(MakePiece(data, 0, v1::TENSOR_KEYS, 64, 64))};
       },
       kInvalid,
       {"keys", "overlap"}},
      {"AgainWithOtherBytes",
       [](const PromptData& data) {
         v1::TensorPiece piece = MakePiece(data, 0, v1::TENSOR_KEYS, 0, kHalf);
         (*piece.mutable_data())[kHalf - 1] ^= 1;
         return Messages{PieceMessage(piece)};
       },
       grpc::StatusCode::ALREADY_EXISTS,
       {"keys", "layer 0"}},
      {"AnsweredLayerAgainWithOtherBytes",
       [](const PromptData& data) {
         v1::TensorPiece piece = MakePiece(data, 0, v1::TENSOR_VALUES);
         (*piece.mutable_data())[0] ^= 1;
         return Messages{PieceMessage(MakePiece(data, 0, v1::TENSOR_KEYS, kHalf, kHalf)),
                         PieceMessage(MakePiece(data, 0, v1::TENSOR_VALUES)),
                         PieceMessage(MakePiece(data, 0, v1::TENSOR_WINDOW_QUERIES)),
                         PieceMessage(MakePiece(data, 1, v1::TENSOR_KEYS)), PieceMessage(piece)};
       },
       grpc::StatusCode::ALREADY_EXISTS,
       {"values", "layer 0"}},
      {"NoPieces",
       [](const PromptData&) {
         v1::CompressRequest request;
         request.mutable_pieces();
         return Messages{request};
       },
       kInvalid,
       {"pieces"}},
      {"GoodThenBadInOneMessage",
       [](const PromptData& data) {
         v1::CompressRequest request = LayerMessage(data, 1);
         *request.mutable_pieces()->add_pieces() = MakePiece(data, 1, v1::TENSOR_KEYS, 0, 64);
         request.mutable_pieces()->mutable_pieces(3)->set_layer(9);
         return Messages{request};
       },
       kOutOfRange,
       {"layer", "9"}},
  };
}

INSTANTIATE_TEST_SUITE_P(, BadPieceTest, ::testing::ValuesIn(Cases()),
                         [](const auto& instance) { return instance.param.name; });

// A value in the statistics that no score can come from: layer and token are named.
struct ValueCase {
  std::string name;
  v1::Tensor tensor;
  float value;
  v1::Statistic statistic;
};

void PrintTo(const ValueCase& value_case, std::ostream* out) { *out << value_case.name; }

class BadValueTest
    : public ServiceTest,
      public ::testing::WithParamInterface<std::tuple<ValueCase, v1::DType, v1::Layout>> {};

TEST_P(BadValueTest, NamesLayerAndToken) {
  const auto& [value_case, dtype, layout] = GetParam();
  Start();
  v1::Open open = SmallOpen(100);
  open.set_dtype(dtype);
  open.set_layout(layout);
  open.set_statistic(value_case.statistic);
  PromptData data(open, 2);
  // Token 40 of KV head 1, in layer 2; of the queries, the head's last row, which sees every key.
  constexpr uint32_t kToken = 40;
  size_t index = 0;
  if (value_case.tensor == v1::TENSOR_KEYS) {
    index = (layout == v1::LAYOUT_HEAD_TOKEN_DIM ? 100 + kToken : kToken * 2 + 1) * 32 + 5;
  } else if (value_case.tensor == v1::TENSOR_WINDOW_QUERIES) {
    index = (2 * 8 + 7) * 32 + 5;
  } else {
    index = value_case.statistic == v1::STATISTIC_SALIENCY ? kToken : 100 + kToken;
  }
  SetElement(value_case.tensor == v1::TENSOR_SALIENCY ? v1::DTYPE_F32 : dtype, value_case.value,
             index, data.mutable_tensor(2, value_case.tensor));
  std::vector<std::string> texts = {"layer 2", "token"};
  if (value_case.tensor != v1::TENSOR_WINDOW_QUERIES) texts.emplace_back("40");
  ExpectFailure(Run(AllMessages(data)), grpc::StatusCode::INVALID_ARGUMENT, texts);
}

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::string ValueName(
    const ::testing::TestParamInfo<std::tuple<ValueCase, v1::DType, v1::Layout>>& instance) {
  const auto& [value_case, dtype, layout] = instance.param;
  return value_case.name + "_" + v1::DType_Name(dtype).substr(6) + "_" +
         (layout == v1::LAYOUT_HEAD_TOKEN_DIM ? "HeadFirst" : "TokenFirst");
}

INSTANTIATE_TEST_SUITE_P(
    Tensors, BadValueTest,
    ::testing::Combine(
        ::testing::Values(
            ValueCase{"NanKey", v1::TENSOR_KEYS, kNan, v1::STATISTIC_WINDOW_QUERIES},
            ValueCase{"InfKey", v1::TENSOR_KEYS, kInf, v1::STATISTIC_WINDOW_QUERIES},
            ValueCase{"NanQuery", v1::TENSOR_WINDOW_QUERIES, kNan, v1::STATISTIC_WINDOW_QUERIES},
            ValueCase{"InfQuery", v1::TENSOR_WINDOW_QUERIES, kInf, v1::STATISTIC_WINDOW_QUERIES}),
        ::testing::Values(v1::DTYPE_F32, v1::DTYPE_F16, v1::DTYPE_BF16),
        ::testing::Values(v1::LAYOUT_HEAD_TOKEN_DIM, v1::LAYOUT_TOKEN_HEAD_DIM)),
    ValueName);

std::vector<ValueCase> SaliencyCases() {
  std::vector<ValueCase> cases;
  for (const v1::Statistic statistic :
       {v1::STATISTIC_SALIENCY, v1::STATISTIC_SALIENCY_PER_KV_HEAD}) {
    const std::string where = statistic == v1::STATISTIC_SALIENCY ? "" : "PerHead";
    for (const auto& [name, value] :
         {std::pair("Nan", kNan), std::pair("Inf", kInf), std::pair("MinusInf", -kInf),
          std::pair("Negative", -0.5F), std::pair("TinyNegative", -1e-40F)}) {
      cases.push_back({name + where, v1::TENSOR_SALIENCY, value, statistic});
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Saliency, BadValueTest,
                         ::testing::Combine(::testing::ValuesIn(SaliencyCases()),
                                            ::testing::Values(v1::DTYPE_BF16),
                                            ::testing::Values(v1::LAYOUT_HEAD_TOKEN_DIM)),
                         ValueName);

class OddValueTest : public ServiceTest {};

TEST_F(OddValueTest, SaliencyOfNothingButZeros) {
  Start();
  v1::Open open = SmallOpen(100);
  open.set_statistic(v1::STATISTIC_SALIENCY);
  PromptData data(open, 3);
  data.mutable_tensor(1, v1::TENSOR_SALIENCY)->assign(400, '\0');
  ExpectFailure(Run(AllMessages(data)), grpc::StatusCode::INVALID_ARGUMENT, {"layer 1"});
}

TEST_F(OddValueTest, NanLse) {
  Start();
  v1::Open open = SmallOpen(100);
  open.set_window_lse(true);
  PromptData data(open, 4);
  SetElement(v1::DTYPE_F32, kNan, 3, data.mutable_tensor(1, v1::TENSOR_WINDOW_LSE));
  ExpectFailure(Run(AllMessages(data)), grpc::StatusCode::INVALID_ARGUMENT, {"layer 1"});
}

// Values take no part in the statistics: whatever they hold comes back as it is.
TEST_F(OddValueTest, NanInValuesPassesThrough) {
  Start();
  PromptData data(SmallOpen(100), 5);
  for (uint32_t i = 0; i < 100; ++i) {
    SetElement(v1::DTYPE_BF16, i % 2 == 0 ? kNan : -kInf, i * 32,
               data.mutable_tensor(1, v1::TENSOR_VALUES));
  }
  ExpectSuccess(data, Run(AllMessages(data)));
}

}  // namespace
}  // namespace structkv::testkit
