// Rows that the server asks for: keys alone, or the worker's statistics alone, decide, and a tenth
// of the values travels. The answers are those of whole layers, to the byte.
#include "tests/testing/pull.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/process.h"
#include "tests/testing/prompt_cases.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

std::string Results(const Outcome& outcome) {
  Answer answer = Assemble(outcome);
  EXPECT_THAT(answer.faults, ::testing::IsEmpty());
  answer.summary.reset();  // the bytes that came differ
  return ResultBytes(answer);
}

uint64_t OutputBytes(const Answer& answer) {
  uint64_t bytes = 0;
  for (const auto& [index, layer] : answer.layers) {
    for (const auto& [tensor, data] : layer.tensors) bytes += data.size();
  }
  for (const auto& [index, pull] : answer.pulls) bytes += pull.positions.size();
  if (answer.pivot) {
    for (const auto& [tensor, data] : answer.pivot->tensors) bytes += data.size();
  }
  return bytes;
}

// Prompts with statistics and rows to gather: every kind, and the methods that have none of their
// own there.
std::vector<PromptCase> GatheringCases() {
  std::vector<PromptCase> cases;
  for (const PromptCase& each : PromptCases()) {
    const Effective effective(each.open);
    // What is refused.
    if (each.open.has_paged() || each.open.geometry().values_in_keys()) continue;
    if (!effective.plan && !effective.streaming && !effective.full) cases.push_back(each);
  }
  v1::Open open = SmallOpen();
  open.mutable_method()->mutable_pyramidkv();
  open.mutable_geometry()->set_value_dim(64);
  cases.push_back({"PyramidKv", open});
  open.mutable_method()->mutable_fastkv()->set_tsp_layer(1);
  open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
  cases.push_back({"FastKv", open});
  open.mutable_method()->mutable_h2o();
  open.set_dtype(v1::DTYPE_F32);
  open.set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
  cases.push_back({"H2o", open});
  open.mutable_method()->mutable_snapkv();
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  cases.push_back({"SnapKvSaliency", open});
  return cases;
}

struct PullCase {
  std::string name;
  v1::Open open;
  v1::Pull pull;
};

void PrintTo(const PullCase& pull, std::ostream* out) { *out << pull.name; }

std::vector<PullCase> PullCases() {
  std::vector<PullCase> cases;
  for (const PromptCase& each : GatheringCases()) {
    cases.push_back({each.name + "Values", each.open, v1::PULL_VALUES});
    if (Effective(each.open).statistic == v1::STATISTIC_WINDOW_QUERIES) continue;
    cases.push_back({each.name + "KeysAndValues", each.open, v1::PULL_KEYS_AND_VALUES});
  }
  return cases;
}

class PullTest : public ServiceTest {};
class PullKindsTest : public PullTest, public ::testing::WithParamInterface<PullCase> {};

TEST_P(PullKindsTest, IsAnsweredAsWholeLayersAre) {
  Start();
  const PromptData data(GetParam().open, 41);
  const Outcome whole = Run(AllMessages(data));
  ExpectSuccess(data, whole);
  for (uint32_t in_flight = 1; in_flight <= data.layers(); in_flight += 2) {
    SCOPED_TRACE(in_flight);
    const Outcome pulled = RunWithPull(channel(), data, GetParam().pull, in_flight);
    ASSERT_TRUE(pulled.status.ok()) << pulled.status.error_message();
    EXPECT_TRUE(Results(pulled) == Results(whole));
    const Answer answer = Assemble(pulled);
    EXPECT_EQ(answer.pulls.size(), data.layers());
    EXPECT_EQ(answer.summary->fingerprint(), Assemble(whole).summary->fingerprint());
    EXPECT_LE(answer.summary->input_bytes(), Assemble(whole).summary->input_bytes());
    EXPECT_EQ(answer.summary->output_bytes(), OutputBytes(answer));
    for (const auto& [layer, each] : answer.pulls) {
      EXPECT_EQ(each.pull.tensors_size(), GetParam().pull == v1::PULL_VALUES ? 1 : 2);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, PullKindsTest, ::testing::ValuesIn(PullCases()),
                         [](const auto& instance) { return instance.param.name; });

// Positions of a layer of skeleton rows are the prompt's, and so are those of its pull.
TEST_F(PullTest, OfSkeletonRows) {
  Start();
  for (const bool per_head : {false, true}) {
    SCOPED_TRACE(per_head);
    v1::Open open = SmallOpen(300);
    open.mutable_geometry()->set_layer_count(8);
    open.set_return_saliency(true);
    v1::StructKvMethod* method = open.mutable_method()->mutable_structkv();
    method->mutable_pivot()->set_mode(v1::PIVOT_MODE_FIXED);
    method->mutable_pivot()->set_fixed_layer(3);
    if (per_head) {
      method->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
      open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
    }
    PromptData data(open, 43);
    Call call(channel());
    PullWorker worker(&call, &data, v1::PULL_VALUES);
    call.Send(worker.OpenMessage(1));
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      if (layer > 3) data.KeepRows(layer, call.Skeleton());
      worker.SendLayer(layer);
      ASSERT_TRUE(worker.AnswerPull(layer)) << layer;
      ASSERT_TRUE(call.WaitForLayer(layer)) << layer;
    }
    call.Send(CommitMessage(data.layers(), worker.sent_bytes()));
    call.HalfClose();
    const Outcome pulled = call.Finish();
    ASSERT_TRUE(pulled.status.ok()) << pulled.status.error_message();
    Call again(channel());
    again.Send(OpenMessage(data.open()));
    for (uint32_t layer = 0; layer < data.layers(); ++layer) {
      again.Send(LayerMessage(data, layer));
      ASSERT_TRUE(again.WaitForLayer(layer)) << layer;
    }
    again.Send(CommitMessage(data));
    again.HalfClose();
    const Outcome whole = again.Finish();
    ExpectSuccess(data, whole);
    EXPECT_TRUE(Results(pulled) == Results(whole));
  }
}

TEST_F(PullTest, ALongPullComesInSeveralMessages) {
  Start();
  v1::Open open = SmallOpen(9000);
  open.mutable_geometry()->set_layer_count(2);
  open.set_max_response_message_bytes(64 << 10);
  open.set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
  v1::StructKvMethod* method = open.mutable_method()->mutable_structkv();
  method->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
  method->mutable_kv_budget()->set_ratio(0.98);
  const PromptData data(open, 3);
  const Outcome whole = Run(AllMessages(data));
  const Outcome pulled = RunWithPull(channel(), data, v1::PULL_KEYS_AND_VALUES, 2);
  ASSERT_TRUE(pulled.status.ok()) << pulled.status.error_message();
  EXPECT_TRUE(Results(pulled) == Results(whole));
  const auto pulls = std::count_if(pulled.responses.begin(), pulled.responses.end(),
                                   [](const auto& response) { return response.has_pull(); });
  EXPECT_GT(pulls, 2);
}

TEST_F(PullTest, ReservesLessAndKeepsToIt) {
  StartAlone(TestOptions());
  v1::Open open = SmallOpen(16000);
  open.set_return_saliency(true);
  for (const auto& [statistic, pull, share] :
       {std::tuple(v1::STATISTIC_WINDOW_QUERIES, v1::PULL_VALUES, 0.8),
        std::tuple(v1::STATISTIC_SALIENCY, v1::PULL_KEYS_AND_VALUES, 0.55)}) {
    SCOPED_TRACE(v1::Pull_Name(pull));
    Restart(TestOptions());
    open.set_statistic(statistic);
    const PromptData data(open, 5);
    const Outcome pulled = RunWithPull(channel(), data, pull, 2);
    ASSERT_TRUE(pulled.status.ok()) << pulled.status.error_message();
    const auto reserved = pulled.responses[0].opened().reserved_bytes();
    EXPECT_LE(server().sessions().buffers().peak_in_use_bytes(), reserved);
    const Outcome whole = Run(AllMessages(data));
    EXPECT_LT(static_cast<double>(reserved),
              share * static_cast<double>(whole.responses[0].opened().reserved_bytes()));
  }
}

// What may go wrong once a layer's rows were asked for. The prompt has two layers in flight; the
// pull of layer 0 has come.
class BadPullTest : public PullTest {
 protected:
  void SetUp() override {
    Start();
    call_ = std::make_unique<Call>(channel());
    worker_ = std::make_unique<PullWorker>(call_.get(), &data_, v1::PULL_VALUES);
    call_->Send(worker_->OpenMessage(2));
    worker_->SendLayer(0);
    const auto positions = call_->WaitForPull(0);
    ASSERT_TRUE(positions.has_value());
    positions_ = *positions;
  }
  void TearDown() override {
    call_.reset();
    ExpectMemoryBack();
  }
  v1::TensorPiece Rows(uint64_t begin, uint64_t size) const {
    v1::TensorPiece piece;
    piece.set_tensor(v1::TENSOR_VALUES);
    piece.set_offset_bytes(begin);
    piece.set_data(PulledRows(data_, 0, v1::TENSOR_VALUES, positions_, false).substr(begin, size));
    return piece;
  }
  Outcome SendAndFinish(v1::TensorPiece piece) {
    call_->Send(PieceMessage(std::move(piece)));
    return call_->Finish();
  }

  const PromptData data_{SmallOpen(), 7};
  const uint64_t row_bytes_ = 32 * 2;
  const uint64_t rows_bytes_ = 2 * 20 * row_bytes_;
  std::vector<int32_t> positions_;
  std::unique_ptr<Call> call_;
  std::unique_ptr<PullWorker> worker_;
};

TEST_F(BadPullTest, RowsOfALayerThatWasNotPulled) {
  v1::TensorPiece piece = Rows(0, row_bytes_);
  piece.set_layer(1);
  ExpectFailure(SendAndFinish(piece), grpc::StatusCode::INVALID_ARGUMENT,
                {"layer 1, values", "before the layer's pull"});
}

TEST_F(BadPullTest, TheWholeTensorInPlaceOfTheRows) {
  ExpectFailure(SendAndFinish(MakePiece(data_, 0, v1::TENSOR_VALUES)),
                grpc::StatusCode::INVALID_ARGUMENT,
                {"layer 0, values", "25600 bytes", "leaves the tensor, which has 2560 bytes"});
}

TEST_F(BadPullTest, RowsPastTheLast) {
  v1::TensorPiece piece = Rows(0, row_bytes_);
  piece.set_offset_bytes(rows_bytes_);
  ExpectFailure(SendAndFinish(piece), grpc::StatusCode::INVALID_ARGUMENT,
                {"layer 0, values", "leaves the tensor, which has 2560 bytes"});
}

TEST_F(BadPullTest, RowsThatOverlap) {
  call_->Send(PieceMessage(Rows(0, 2 * row_bytes_)));
  ExpectFailure(SendAndFinish(Rows(row_bytes_, 2 * row_bytes_)), grpc::StatusCode::INVALID_ARGUMENT,
                {"layer 0, values", "overlaps"});
}

TEST_F(BadPullTest, RowsAgainWithOtherBytes) {
  call_->Send(PieceMessage(Rows(0, row_bytes_)));
  v1::TensorPiece piece = Rows(0, row_bytes_);
  (*piece.mutable_data())[3] ^= 1;
  ExpectFailure(SendAndFinish(piece), grpc::StatusCode::ALREADY_EXISTS, {"layer 0, values"});
}

TEST_F(BadPullTest, KeysAgainWithOtherBytesAfterThePull) {
  v1::TensorPiece piece = MakePiece(data_, 0, v1::TENSOR_KEYS, 0, 64);
  ExpectFailure(SendAndFinish(piece), grpc::StatusCode::INVALID_ARGUMENT,
                {"layer 0, keys", "overlaps"});
}

TEST_F(BadPullTest, RowsWithAWrongChecksum) {
  v1::TensorPiece piece = Rows(0, row_bytes_);
  piece.set_xxh3_64(1);
  ExpectFailure(SendAndFinish(piece), grpc::StatusCode::DATA_LOSS, {"layer 0, values"});
}

TEST_F(BadPullTest, ALayerAheadOfTheWindowThatTheRowsHoldOpen) {
  worker_->SendLayer(1);
  worker_->SendLayer(2);
  ExpectFailure(call_->Finish(), grpc::StatusCode::INVALID_ARGUMENT,
                {"layer 2", "too early", "layer 0 is unfinished and layers_in_flight is 2"});
}

TEST_F(BadPullTest, ACommitBeforeTheRows) {
  call_->Send(PieceMessage(Rows(0, row_bytes_)));
  call_->Send(CommitMessage(data_.layers(), worker_->sent_bytes() + row_bytes_));
  ExpectFailure(call_->Finish(), grpc::StatusCode::INVALID_ARGUMENT,
                {"commit of 4 layers, but 0 are complete", "layer 0, values has 64 of 2560 bytes"});
}

TEST_F(BadPullTest, TheEndOfTheStreamBeforeTheRows) {
  call_->Send(PieceMessage(Rows(0, row_bytes_)));
  call_->HalfClose();
  ExpectFailure(call_->Finish(), grpc::StatusCode::INVALID_ARGUMENT,
                {"the stream ended before `commit`; 0 of 4 layers"});
}

TEST_F(BadPullTest, AWorkerThatGoesAway) {
  call_->Send(PieceMessage(Rows(0, row_bytes_)));
  call_->Cancel();
  EXPECT_EQ(call_->Finish().status.error_code(), grpc::StatusCode::CANCELLED);
}

// The same piece again is ignored, whether the layer waits for it or was answered with it.
TEST_F(BadPullTest, ResentPiecesAreIgnored) {
  call_->Send(PieceMessage(Rows(0, row_bytes_)));
  call_->Send(PieceMessage(Rows(0, row_bytes_)));
  call_->Send(worker_->LayerMessage(0));
  const v1::CompressRequest rest = PieceMessage(Rows(row_bytes_, rows_bytes_ - row_bytes_));
  call_->Send(rest);
  ASSERT_TRUE(call_->WaitForLayer(0));
  call_->Send(rest);
  call_->Send(worker_->LayerMessage(0));
  for (uint32_t layer = 1; layer < data_.layers(); ++layer) {
    worker_->SendLayer(layer);
    ASSERT_TRUE(worker_->AnswerPull(layer));
  }
  call_->Send(CommitMessage(data_.layers(), worker_->sent_bytes() + rows_bytes_));
  call_->HalfClose();
  const Outcome outcome = call_->Finish();
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  EXPECT_TRUE(Results(outcome) == Results(Run(AllMessages(data_))));
}

TEST_F(PullTest, RowsThatNeverCome) {
  ServerOptions options = TestOptions();
  options.streams.silence = absl::Milliseconds(300);
  StartAlone(options);
  const PromptData data(SmallOpen(), 7);
  Call call(channel());
  PullWorker worker(&call, &data, v1::PULL_VALUES);
  call.Send(worker.OpenMessage(2));
  worker.SendLayer(0);
  ASSERT_TRUE(call.WaitForPull(0).has_value());
  ExpectFailure(call.Finish(), grpc::StatusCode::DEADLINE_EXCEEDED,
                {"no message came", "the rows of 1 layers were asked for"});
  ExpectNothingHeld();
}

struct BadOpen {
  const char* name;
  v1::Pull pull;
  std::function<void(v1::Open*)> change;
  std::vector<std::string> texts;
};

TEST_F(PullTest, WhatCannotBePulled) {
  Start();
  const BadOpen opens[] = {
      {"unknown", static_cast<v1::Pull>(9), [](v1::Open*) {}, {"open.pull is 9", "PULL_VALUES"}},
      {"plan",
       v1::PULL_VALUES,
       [](v1::Open* open) { open->set_output(v1::OUTPUT_PLAN); },
       {"open.pull: VALUES", "PLAN"}},
      {"streaming",
       v1::PULL_VALUES,
       [](v1::Open* open) { open->mutable_method()->mutable_streaming_llm(); },
       {"open.pull: VALUES", "streaming_llm"}},
      {"full",
       v1::PULL_KEYS_AND_VALUES,
       [](v1::Open* open) { open->mutable_method()->mutable_full(); },
       {"open.pull: KEYS_AND_VALUES", "full"}},
      {"decode shards",
       v1::PULL_VALUES,
       [](v1::Open* open) {
         open->mutable_shard_group()->set_shard_count(1);
         open->mutable_shard_group()->set_decode_shard_count(2);
       },
       {"open.pull: VALUES", "decode_shard_count is 2"}},
      {"keys",
       v1::PULL_KEYS_AND_VALUES,
       [](v1::Open*) {},
       {"open.pull: KEYS_AND_VALUES", "WINDOW_QUERIES"}},
  };
  for (const BadOpen& each : opens) {
    SCOPED_TRACE(each.name);
    v1::Open open = SmallOpen();
    open.set_pull(each.pull);
    each.change(&open);
    ExpectFailure(Run({OpenMessage(open)}), grpc::StatusCode::INVALID_ARGUMENT, each.texts);
    ExpectMemoryBack();
  }
}

}  // namespace
}  // namespace structkv::testkit
