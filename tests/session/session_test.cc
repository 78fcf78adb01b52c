// What Session and SessionManager promise, one thing at a time; random sequences are in
// session_random_test.cc, faults in session_fault_test.cc.
#include "service/session/session.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend_registry.h"
#include "service/session/limit.h"
#include "tests/session/session_probe.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/prompt_cases.h"

namespace structkv::session {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class SessionTest : public ::testing::Test {
 protected:
  explicit SessionTest(SessionManagerOptions options = {.idle_buffer_bytes = 0, .threads = 2})
      : manager_(std::move(options), *CreateBackend("auto")) {}

  void Use(const std::string& name) {
    data_ = std::make_unique<testkit::PromptData>(testkit::FindCase(name).open, 9);
    request_ = {.spec = testkit::SpecOf(data_->open())};
    request_.layers_in_flight = std::min<int64_t>(2, request_.spec.geometry.layers);
  }
  void SetUp() override { Use("StructKv"); }

  std::shared_ptr<Session> Open() {
    absl::StatusOr<std::shared_ptr<Session>> session = manager_.Open(request_);
    EXPECT_TRUE(session.ok()) << session.status();
    return session.ok() ? *std::move(session) : nullptr;
  }
  InputMessage Layer(int64_t layer) const {
    return MessageOf(LayerPieces(*data_, request_.spec, layer));
  }
  void ExpectFree() {
    EXPECT_TRUE(Eventually([&] {
      return manager_.budget().reserved_bytes() == 0 && manager_.active_sessions() == 0 &&
             manager_.buffers().in_use_bytes() == 0;
    }));
  }
  absl::Status WaitForFailure() {
    EXPECT_TRUE(probe_->WaitFor([](const Seen& seen) { return seen.failed.has_value(); }));
    return probe_->seen().failed.value_or(absl::OkStatus());
  }

  std::unique_ptr<testkit::PromptData> data_;
  SessionRequest request_;
  SessionManager manager_;
  const std::shared_ptr<Probe> probe_ = std::make_shared<Probe>();
};

TEST_F(SessionTest, EveryKindOfPromptIsAnsweredAsByTheEngineAlone) {
  engine::BufferPool pool(0);
  for (const testkit::PromptCase& each : testkit::PromptCases()) {
    SCOPED_TRACE(each.name);
    Use(each.name);
    const absl::StatusOr<testkit::Answer> direct = testkit::CompressDirectly(
        *data_, manager_.backend(), &pool, testkit::InOrder(data_->layers()), SerialFor);
    ASSERT_TRUE(direct.ok()) << direct.status();
    for (request_.layers_in_flight = 1; request_.layers_in_flight <= request_.spec.geometry.layers;
         ++request_.layers_in_flight) {
      const absl::StatusOr<testkit::Answer> answer = RunPrompt(manager_, *data_, request_);
      ASSERT_TRUE(answer.ok()) << answer.status();
      EXPECT_TRUE(testkit::ResultBytes(*answer) == testkit::ResultBytes(*direct));
      ExpectFree();
    }
  }
}

TEST_F(SessionTest, ASessionSaysWhatItIs) {
  const std::shared_ptr<Session> a = Open();
  const std::shared_ptr<Session> b = Open();
  EXPECT_EQ(a->id().size(), 32U);
  EXPECT_NE(a->id(), b->id());
  EXPECT_EQ(a->layers_in_flight(), 2);
  EXPECT_EQ(a->spec().prompt_tokens, request_.spec.prompt_tokens);
  EXPECT_EQ(manager_.budget().reserved_bytes(), 2 * a->reserved_bytes());
  EXPECT_EQ(manager_.active_sessions(), 2);
}

// Twelve layers of 2 MB pass through, and no more than what was reserved is ever held.
TEST_F(SessionTest, MemoryStaysWithinTheReservation) {
  v1::Open open = testkit::FindCase("StructKvEverythingReturned").open;
  open.mutable_geometry()->set_layer_count(12);
  open.set_prompt_tokens(8000);
  const testkit::PromptData data(open, 1);
  request_ = {.spec = testkit::SpecOf(open)};
  const int64_t reserved = Open()->reserved_bytes();
  ASSERT_TRUE(RunPrompt(manager_, data, request_).ok());
  const auto peak = static_cast<int64_t>(manager_.buffers().peak_in_use_bytes());
  EXPECT_LE(peak, reserved);
  EXPECT_LT(reserved, static_cast<int64_t>(data.total_bytes()));
  // The two layers in flight were held at once.
  EXPECT_GT(peak, static_cast<int64_t>(data.total_bytes()) / 12);
  ExpectFree();
}

TEST_F(SessionTest, AReaderThatStaysAwayStopsItsOwnInput) {
  const std::shared_ptr<Session> session = Open();
  session->Start(probe_->Callbacks());
  int64_t sent = 0;
  const auto feed = [&](int64_t until) {
    for (; sent < until; ++sent) {
      ASSERT_TRUE(probe_->WaitFor([&](const Seen& seen) { return seen.ready > sent; }));
      session->Append(Layer(sent));
    }
  };
  feed(2);
  // Two layers are answered, more may not wait: the third is taken in, and computed later.
  ASSERT_TRUE(probe_->WaitFor([](const Seen& seen) { return seen.answer.layers.size() == 2; }));
  feed(3);
  EXPECT_EQ(probe_->seen().ready, 3);
  EXPECT_EQ(probe_->seen().answer.layers.size(), 2U);
  const int64_t unsent = probe_->seen().unsent_bytes;
  session->OutputSent(unsent);
  feed(4);
  EXPECT_TRUE(probe_->WaitFor([](const Seen& seen) { return seen.answer.layers.size() == 4; }));
}

TEST_F(SessionTest, TheReservationIsKeptUntilAllResultsAreSent) {
  const std::shared_ptr<Session> session = Open();
  session->Start(probe_->Callbacks());
  int64_t reported = 0;
  for (int64_t layer = 0; layer < 4; ++layer) {
    ASSERT_TRUE(probe_->WaitFor([&](const Seen& seen) { return seen.ready > layer; }));
    session->Append(Layer(layer));
    ASSERT_TRUE(probe_->WaitFor([&](const Seen& seen) {
      return seen.answer.order.size() == static_cast<size_t>(layer) + 1;
    }));
    if (layer == 3) break;
    session->OutputSent(probe_->seen().unsent_bytes - reported);
    reported = probe_->seen().unsent_bytes;
  }
  session->Commit(4, static_cast<int64_t>(data_->total_bytes()));
  ASSERT_TRUE(probe_->WaitFor([](const Seen& seen) { return seen.finished.has_value(); }));
  const int64_t left = probe_->seen().unsent_bytes - reported;
  ASSERT_GT(left, 1);
  session->OutputSent(left - 1);
  EXPECT_EQ(manager_.active_sessions(), 1);
  EXPECT_EQ(manager_.budget().reserved_bytes(), session->reserved_bytes());
  session->OutputSent(1);
  ExpectFree();
  session->Cancel();  // of no effect any more
  EXPECT_THAT(probe_->seen().faults, IsEmpty());
}

TEST_F(SessionTest, MessagesNobodyAskedForAreAFaultOfTheCaller) {
  std::shared_ptr<Session> session = Open();
  session->Append(Layer(0));  // before Start, which reports it
  EXPECT_EQ(probe_->seen().failed, std::nullopt);
  session->Start(probe_->Callbacks());
  EXPECT_EQ(WaitForFailure().code(), absl::StatusCode::kInternal);
  ExpectFree();
}

TEST_F(SessionTest, WhatFailedBeforeStartIsReportedByStart) {
  const std::shared_ptr<Session> session = Open();
  manager_.FailAll(absl::UnavailableError("the first reason"));
  manager_.FailAll(absl::UnavailableError("another one"));
  ExpectFree();
  session->Start(probe_->Callbacks());
  EXPECT_EQ(WaitForFailure(), absl::UnavailableError("the first reason"));
  EXPECT_EQ(probe_->seen().ready, 0);
}

TEST_F(SessionTest, NothingIsCalledAfterCancel) {
  const std::shared_ptr<Session> session = Open();
  session->Cancel();
  ExpectFree();
  session->Start(probe_->Callbacks());
  session->Append(Layer(0));
  session->Commit(4, 0);
  session->EndOfInput();
  session->OutputSent(5);
  const Seen seen = probe_->seen();
  EXPECT_EQ(seen.ready, 0);
  EXPECT_FALSE(seen.failed.has_value());
}

// Calls from within callbacks come after them: a client may well be written that way.
TEST_F(SessionTest, CallbacksMayCallTheSession) {
  struct Client {
    std::shared_ptr<Session> session;
    int64_t next = 0;
    std::vector<uint32_t> layers;
  } client;
  client.session = Open();
  std::mutex mutex;
  std::condition_variable changed;
  bool finished = false;
  SessionCallbacks callbacks;
  callbacks.ready = [&] {
    if (client.next < 4) {
      client.session->Append(Layer(client.next++));
    } else {
      client.session->Commit(4, static_cast<int64_t>(data_->total_bytes()));
    }
  };
  callbacks.layer = [&](const engine::LayerOutput& output) {
    client.layers.push_back(static_cast<uint32_t>(output.layer));
    client.session->OutputSent(OutputBytes(output));
  };
  callbacks.pivot = [&](const engine::PivotResult& result) {
    client.session->OutputSent(OutputBytes(result));
  };
  callbacks.finished = [&](const SessionSummary& summary) {
    EXPECT_EQ(summary.layers, 4);
    client.session.reset();  // the last share, from within
    const std::lock_guard lock(mutex);
    finished = true;
    changed.notify_all();
  };
  callbacks.failed = [](const absl::Status& status) { FAIL() << status; };
  client.session->Start(std::move(callbacks));
  {
    std::unique_lock lock(mutex);
    ASSERT_TRUE(changed.wait_for(lock, std::chrono::minutes(1), [&] { return finished; }));
  }
  EXPECT_THAT(client.layers, ElementsAre(0, 1, 2, 3));
  ExpectFree();
}

// What is counted for messages is one.
TEST_F(SessionTest, AMessageIsFreedBeforeTheNextOneIsAskedFor) {
  const std::shared_ptr<Session> session = Open();
  std::weak_ptr<const void> owner;
  int asked = 0;
  SessionCallbacks callbacks;
  callbacks.ready = [&] {
    ++asked;
    EXPECT_TRUE(owner.expired());
  };
  session->Start(std::move(callbacks));
  session->Append(MessageOf(LayerPieces(*data_, request_.spec, 0), 2, &owner));
  EXPECT_EQ(asked, 2);
  session->Cancel();
}

TEST_F(SessionTest, DroppingTheLastShareCancels) {
  std::shared_ptr<Session> session = Open();
  session->Start(probe_->Callbacks());
  session->Append(MessageOf({PieceOf(*data_, 0, engine::InputTensor::kKeys, 0, 100)}));
  EXPECT_GT(manager_.buffers().in_use_bytes(), 0U);
  session.reset();
  ExpectFree();
  EXPECT_FALSE(probe_->seen().failed.has_value());
}

TEST_F(SessionTest, InvalidRequestsReserveNothing) {
  request_.spec.prompt_tokens = 0;
  EXPECT_EQ(manager_.Open(request_).status().code(), absl::StatusCode::kInvalidArgument);
  SetUp();
  request_.layers_in_flight = 5;
  EXPECT_EQ(manager_.Open(request_).status().code(), absl::StatusCode::kInvalidArgument);
  ExpectFree();
}

TEST_F(SessionTest, Draining) {
  std::shared_ptr<Session> session = Open();
  session->Start(probe_->Callbacks());
  manager_.StartDraining();
  EXPECT_TRUE(manager_.draining());
  EXPECT_EQ(manager_.Open(request_).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(manager_.WaitUntilEmpty(absl::Milliseconds(1)));
  session->Append(Layer(0));  // one that runs goes on
  EXPECT_TRUE(probe_->WaitFor([](const Seen& seen) { return seen.answer.layers.size() == 1; }));
  manager_.FailAll(absl::UnavailableError("the drain limit passed"));
  EXPECT_EQ(WaitForFailure().code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(manager_.WaitUntilEmpty(absl::InfiniteDuration()));
  ExpectFree();
}

class OneSessionTest : public SessionTest {
 protected:
  OneSessionTest() : SessionTest({.max_sessions = 1, .idle_buffer_bytes = 0, .threads = 1}) {}
};

TEST_F(OneSessionTest, TheNumberOfSessionsIsLimited) {
  std::shared_ptr<Session> session = Open();
  const absl::Status status = manager_.Open(request_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("max_sessions is 1"));
  EXPECT_EQ(LimitOf(status), kMaxSessionsLimit);
  EXPECT_EQ(manager_.budget().reserved_bytes(), session->reserved_bytes());
  session->Cancel();
  Open();
}

TEST_F(OneSessionTest, ASessionWithTheSameKeyTakesThePlace) {
  request_.idempotency_key = "prompt 7";
  const std::shared_ptr<Session> first = Open();
  first->Start(probe_->Callbacks());
  const std::shared_ptr<Session> second = Open();
  EXPECT_EQ(WaitForFailure().code(), absl::StatusCode::kAborted);
  EXPECT_THAT(std::string(WaitForFailure().message()), HasSubstr("idempotency_key"));
  EXPECT_EQ(manager_.active_sessions(), 1);
  second->Cancel();
  ExpectFree();
}

}  // namespace
}  // namespace structkv::session
