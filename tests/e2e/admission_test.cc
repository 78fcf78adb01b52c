// Who gets in: the memory budget, the session limit, idempotency keys, draining.
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/v1/compression.grpc.pb.h"
#include "tests/testing/health.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

class AdmissionTest : public ServiceTest {
 protected:
  // Bytes that the server reserves for a prompt.
  int64_t Reserved(const v1::Open& open) {
    Call call(channel());
    call.Send(OpenMessage(open));
    const std::optional<v1::Opened> opened = call.WaitForOpened();
    return opened ? static_cast<int64_t>(opened->reserved_bytes()) : 0;
  }
};

TEST_F(AdmissionTest, ReservesWhatItSays) {
  Start();
  Call call(channel());
  call.Send(OpenMessage(SmallOpen()));
  const std::optional<v1::Opened> opened = call.WaitForOpened();
  ASSERT_TRUE(opened.has_value());
  EXPECT_EQ(server().sessions().budget().reserved_bytes() - neighbour_bytes(),
            static_cast<int64_t>(opened->reserved_bytes()));
  call.Cancel();
  call.Finish();
  ExpectMemoryBack();
}

TEST_F(AdmissionTest, BudgetTakenByOthers) {
  StartAlone(TestOptions());
  const PromptData data(SmallOpen(2000), 1);
  const int64_t bytes = Reserved(data.open());
  ASSERT_GT(bytes, 0);
  ServerOptions options = TestOptions();
  options.sessions.memory_budget_bytes = 2 * bytes + bytes * 9 / 10;
  options.streams.retry_pushback = absl::Milliseconds(1234);
  StartAlone(options);

  Call first(channel());
  Call second(channel());
  for (Call* call : {&first, &second}) {
    call->Send(OpenMessage(data.open()));
    ASSERT_TRUE(call->WaitForOpened().has_value());
  }
  const Outcome refused = Run(AllMessages(data));
  ExpectFailure(refused, grpc::StatusCode::RESOURCE_EXHAUSTED,
                {std::to_string(bytes), std::to_string(2 * bytes),
                 std::to_string(options.sessions.memory_budget_bytes)});
  EXPECT_THAT(refused.responses, ::testing::IsEmpty());
  EXPECT_THAT(refused.trailers,
              ::testing::Contains(::testing::Pair("grpc-retry-pushback-ms", "1234")));

  // A smaller one still fits, and both of the first go on to their ends.
  const PromptData small(SmallOpen(100), 2);
  ExpectSuccess(small, Run(AllMessages(small)));
  for (Call* call : {&first, &second}) {
    const std::vector<v1::CompressRequest> messages = AllMessages(data);
    for (size_t i = 1; i < messages.size(); ++i) call->Send(messages[i]);
    call->HalfClose();
    ExpectSuccess(data, call->Finish());
  }
  ExpectSuccess(data, Run(AllMessages(data)));
}

TEST_F(AdmissionTest, LargerThanTheWholeBudget) {
  ServerOptions options = TestOptions();
  options.sessions.memory_budget_bytes = 64 << 20;
  Start(options);
  const Outcome outcome = Run({OpenMessage(SmallOpen(1 << 20))});
  ExpectFailure(outcome, grpc::StatusCode::RESOURCE_EXHAUSTED, {std::to_string(64 << 20)});
  EXPECT_THAT(outcome.trailers,
              ::testing::Contains(::testing::Pair("grpc-retry-pushback-ms", "-1")));
}

TEST_F(AdmissionTest, SessionLimit) {
  ServerOptions options = TestOptions();
  options.sessions.max_sessions = 2;
  Start(options);
  const PromptData data(SmallOpen(), 1);
  Call call(channel());
  call.Send(OpenMessage(data.open()));
  ASSERT_TRUE(call.WaitForOpened().has_value());
  const Outcome refused = Run(AllMessages(data));
  ExpectFailure(refused, grpc::StatusCode::RESOURCE_EXHAUSTED, {"2"});
  EXPECT_THAT(refused.trailers, ::testing::Contains(::testing::Key("grpc-retry-pushback-ms")));
  call.Cancel();
  call.Finish();
  ExpectMemoryBack();
  ExpectSuccess(data, Run(AllMessages(data)));
}

TEST_F(AdmissionTest, SameKeyTakesThePlaceOfTheOlder) {
  Start();
  v1::Open open = SmallOpen();
  open.set_idempotency_key("prompt 7");
  const PromptData data(open, 1);
  Call older(channel());
  older.Send(OpenMessage(open));
  ASSERT_TRUE(older.WaitForOpened().has_value());
  older.Send(LayerMessage(data, 0));
  ASSERT_TRUE(older.WaitForLayer(0));
  ExpectSuccess(data, Run(AllMessages(data)));
  ExpectFailure(older.Finish(), grpc::StatusCode::ABORTED, {"idempotency_key"});
}

// Where the older one holds memory that the newer needs, that is free first.
TEST_F(AdmissionTest, SameKeyFitsWhereOneFits) {
  StartAlone(TestOptions());
  v1::Open open = SmallOpen(2000);
  open.set_idempotency_key("prompt 8");
  const PromptData data(open, 1);
  const int64_t bytes = Reserved(open);
  ServerOptions options = TestOptions();
  options.sessions.memory_budget_bytes = bytes + bytes / 2;
  StartAlone(options);
  Call older(channel());
  older.Send(OpenMessage(open));
  ASSERT_TRUE(older.WaitForOpened().has_value());
  ExpectSuccess(data, Run(AllMessages(data)));
  ExpectFailure(older.Finish(), grpc::StatusCode::ABORTED, {"idempotency_key"});
}

TEST_F(AdmissionTest, EmptyKeysAreNotTheSame) {
  Start();
  const PromptData data(SmallOpen(), 1);
  Call first(channel());
  first.Send(OpenMessage(data.open()));
  ASSERT_TRUE(first.WaitForOpened().has_value());
  ExpectSuccess(data, Run(AllMessages(data)));
  const std::vector<v1::CompressRequest> messages = AllMessages(data);
  for (size_t i = 1; i < messages.size(); ++i) first.Send(messages[i]);
  first.HalfClose();
  ExpectSuccess(data, first.Finish());
}

TEST_F(AdmissionTest, LimitsMayChangeUnderStreams) {
  ServerOptions options = TestOptions();
  options.sessions.max_sessions = 1;
  StartAlone(options);
  const PromptData data(SmallOpen(), 1);
  Call silent(channel());
  silent.Send(OpenMessage(data.open()));
  ASSERT_TRUE(silent.WaitForOpened().has_value());
  ExpectFailure(Run(AllMessages(data)), grpc::StatusCode::RESOURCE_EXHAUSTED,
                {"max_sessions is 1"});
  options.sessions.max_sessions = 2;
  ASSERT_TRUE(server().Reload(options).ok());
  ExpectSuccess(data, Run(AllMessages(data)));

  // What does not agree changes nothing.
  ServerOptions wrong = options;
  wrong.sessions.max_sessions = 1;
  wrong.streams.stall = absl::ZeroDuration();
  EXPECT_EQ(server().Reload(wrong).message(), "the stall limit is 0; it must be above 0");
  EXPECT_TRUE(Eventually([&] { return server().sessions().active_sessions() == 1; }));
  ExpectSuccess(data, Run(AllMessages(data)));

  options.streams.silence = absl::Milliseconds(200);
  ASSERT_TRUE(server().Reload(options).ok());
  ExpectFailure(silent.Finish(), grpc::StatusCode::DEADLINE_EXCEEDED, {"silence limit"});
  ExpectNothingHeld();
}

// The neighbour is the stream that runs: it may finish, nobody else comes in, and health says so.
TEST_F(AdmissionTest, DrainLetsTheRunningFinish) {
  Start();
  EXPECT_EQ(Health(channel()), "SERVING");
  EXPECT_EQ(Health(channel(), "structkv.v1.Compression"), "SERVING");
  bool finished = false;
  std::thread drain([&] { finished = server().Drain(absl::Seconds(30)); });
  EXPECT_TRUE(Eventually([&] { return Health(channel()) == "NOT_SERVING"; }));
  EXPECT_EQ(Health(channel(), "structkv.v1.Compression"), "NOT_SERVING");
  EXPECT_TRUE(Eventually([&] { return server().sessions().draining(); }));
  const PromptData data(SmallOpen(), 1);
  ExpectFailure(Run(AllMessages(data)), grpc::StatusCode::UNAVAILABLE, {"drain"});
  ExpectUndisturbed();
  drain.join();
  EXPECT_TRUE(finished);
}

TEST_F(AdmissionTest, DrainEndsWhatTakesTooLong) {
  StartAlone(TestOptions());
  const PromptData data(SmallOpen(), 1);
  Call call(channel());
  call.Send(OpenMessage(data.open()));
  ASSERT_TRUE(call.WaitForOpened().has_value());
  call.Send(LayerMessage(data, 0));
  EXPECT_FALSE(server().Drain(absl::Milliseconds(200)));
  ExpectFailure(call.Finish(), grpc::StatusCode::UNAVAILABLE, {});
}

}  // namespace
}  // namespace structkv::testkit
