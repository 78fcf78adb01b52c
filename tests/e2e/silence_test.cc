// Who is ended by the silence limit: whoever owes a message, and nobody who waits for an answer.
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend_registry.h"
#include "tests/session/fault_backend.h"
#include "tests/testing/pull.h"
#include "tests/testing/service_test.h"
#include "tests/testing/shards.h"

namespace structkv::testkit {
namespace {

constexpr auto kLimit = std::chrono::milliseconds(400);
constexpr uint32_t kTokens = 6000;  // too many to be computed on the thread that reads

class SilenceTest : public ServiceTest {
 protected:
  SilenceTest() {
    ServerOptions options = TestOptions();
    options.streams.silence = absl::FromChrono(kLimit);
    StartAlone(options, session::MakeFaultBackend(*CreateBackend("auto"), faults_));
  }
  void TearDown() override {
    faults_->OpenAllGates();
    ExpectNothingHeld();
  }

  // Sends a layer that is not answered before the gate opens.
  void SendHeldLayer(Call* call, const v1::CompressRequest& layer) {
    faults_->CloseGate(kTokens);
    ASSERT_TRUE(call->Send(layer));
    ASSERT_TRUE(faults_->WaitUntilBlocked(kTokens));
  }
  static void ExpectSilence(const Outcome& outcome, const std::string& more = "") {
    ExpectFailure(outcome, grpc::StatusCode::DEADLINE_EXCEEDED,
                  {"no message came for longer than the silence limit of 400ms", more});
  }

  const PromptData data_{SmallOpen(kTokens), 1};
  const std::shared_ptr<session::Faults> faults_ = std::make_shared<session::Faults>();
};

TEST_F(SilenceTest, ACallerMayWaitForItsAnswer) {
  Call call(channel());
  call.Send(OpenMessage(data_.open()));
  SendHeldLayer(&call, LayerMessage(data_, 0));
  std::this_thread::sleep_for(4 * kLimit);
  faults_->OpenAllGates();
  ASSERT_TRUE(call.WaitForLayer(0));
  for (uint32_t layer = 1; layer < data_.layers(); ++layer) {
    call.Send(LayerMessage(data_, layer));
    ASSERT_TRUE(call.WaitForLayer(layer));
  }
  call.Send(CommitMessage(data_));
  call.HalfClose();
  ExpectSuccess(data_, call.Finish());
}

TEST_F(SilenceTest, TheClockStartsAgainWithTheAnswer) {
  Call call(channel());
  call.Send(OpenMessage(data_.open()));
  SendHeldLayer(&call, LayerMessage(data_, 0));
  std::this_thread::sleep_for(2 * kLimit);
  const auto opened = std::chrono::steady_clock::now();
  faults_->OpenAllGates();
  ASSERT_TRUE(call.WaitForLayer(0));
  ExpectSilence(call.Finish());
  EXPECT_GE(std::chrono::steady_clock::now() - opened, kLimit);
}

TEST_F(SilenceTest, AHalfLayerIsOwedWhileAnotherIsComputed) {
  Call call(channel());
  call.Send(OpenMessage(data_.open()));
  SendHeldLayer(&call, LayerMessage(data_, 0));
  call.Send(PieceMessage(MakePiece(data_, 1, v1::TENSOR_KEYS)));
  ExpectSilence(call.Finish());
}

TEST_F(SilenceTest, PulledRowsAreOwedWhileAnotherLayerIsComputed) {
  Call call(channel());
  PullWorker worker(&call, &data_, v1::PULL_VALUES);
  call.Send(worker.OpenMessage(2));
  worker.SendLayer(0);
  ASSERT_TRUE(call.WaitForPull(0).has_value());
  SendHeldLayer(&call, worker.LayerMessage(1));
  ExpectSilence(call.Finish(), "the rows of 1 layers were asked for");
}

TEST_F(SilenceTest, OfABatchAllPromptsCount) {
  Call call(channel());
  const auto of = [](v1::CompressRequest message, uint32_t prompt) {
    message.set_prompt(prompt);
    return message;
  };
  for (const uint32_t prompt : {0U, 1U}) {
    v1::CompressRequest open = of(OpenMessage(data_.open()), prompt);
    open.mutable_open()->set_batch_prompt_count(2);
    call.Send(open);
  }
  SendHeldLayer(&call, of(LayerMessage(data_, 0), 0));
  std::this_thread::sleep_for(4 * kLimit);
  EXPECT_EQ(server().active_streams(), 1) << "nothing of prompt 1 has begun";
  call.Send(of(PieceMessage(MakePiece(data_, 0, v1::TENSOR_KEYS)), 1));
  ExpectSilence(call.Finish());
}

// A rank that waits for another one's part of its layer outlasts it, and learns whose fault it was.
class SilentRankTest : public SilenceTest, public ::testing::WithParamInterface<bool> {};

TEST_P(SilentRankTest, IsTheOneThatIsEnded) {
  const bool sends_half = GetParam();
  const std::vector<PromptData> parts = SplitByRanks(data_, 2);
  Call waiting(channel());
  waiting.Send(OpenMessage(parts[0].open()));
  waiting.Send(LayerMessage(parts[0], 0));
  std::this_thread::sleep_for(kLimit / 2);
  Call silent(channel());
  silent.Send(OpenMessage(parts[1].open()));
  if (sends_half) silent.Send(PieceMessage(MakePiece(parts[1], 0, v1::TENSOR_KEYS)));
  ExpectSilence(silent.Finish());
  ExpectFailure(waiting.Finish(), grpc::StatusCode::ABORTED,
                {"shard 1 of the group 'group' ended: DEADLINE_EXCEEDED", "no message came"});
}

INSTANTIATE_TEST_SUITE_P(, SilentRankTest, ::testing::Bool(), [](const auto& instance) {
  return instance.param ? "AfterHalfALayer" : "FromTheStart";
});

}  // namespace
}  // namespace structkv::testkit
