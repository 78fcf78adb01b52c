// A backend that blocks or fails in the middle of a prompt.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "kernels/backend_registry.h"
#include "tests/session/fault_backend.h"
#include "tests/session/session_probe.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/prompt_cases.h"

namespace structkv::session {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class SessionFaultTest : public ::testing::Test {
 protected:
  SessionFaultTest() { Make(int64_t{1} << 30); }
  ~SessionFaultTest() override { faults_->OpenAllGates(); }

  void Make(int64_t budget) {
    manager_ = std::make_unique<SessionManager>(
        SessionManagerOptions{.memory_budget_bytes = budget, .idle_buffer_bytes = 0, .threads = 2},
        MakeFaultBackend(*CreateBackend("auto"), faults_));
  }
  std::shared_ptr<Session> Start(const std::shared_ptr<Probe>& probe) {
    absl::StatusOr<std::shared_ptr<Session>> session = manager_->Open(request_);
    EXPECT_TRUE(session.ok()) << session.status();
    if (!session.ok()) return nullptr;
    (*session)->Start(probe->Callbacks());
    return *std::move(session);
  }
  // Appends whole layers as they are asked for.
  void Feed(Session& session, const Probe& probe, int64_t layers) {
    for (int64_t layer = 0; layer < layers; ++layer) {
      ASSERT_TRUE(probe.WaitFor([&](const Seen& seen) { return seen.ready > layer; }));
      session.Append(MessageOf(LayerPieces(data_, request_.spec, layer)));
    }
  }
  bool IsFree() const {
    return manager_->budget().reserved_bytes() == 0 && manager_->active_sessions() == 0 &&
           manager_->buffers().in_use_bytes() == 0;
  }

  static v1::Open LargeOpen(uint32_t tokens) {
    v1::Open open = testkit::FindCase("StructKv").open;
    open.set_prompt_tokens(tokens);
    MakeLarge(&open);
    return open;
  }

  static constexpr int64_t kTokens = 200;
  const std::shared_ptr<Faults> faults_ = std::make_shared<Faults>();
  const testkit::PromptData data_{LargeOpen(kTokens), 4};
  SessionRequest request_{.spec = testkit::SpecOf(data_.open())};
  std::unique_ptr<SessionManager> manager_;
  const std::shared_ptr<Probe> probe_ = std::make_shared<Probe>();
};

TEST_F(SessionFaultTest, CancelWhileALayerIsComputed) {
  for (const bool drop : {false, true}) {
    const auto probe = std::make_shared<Probe>();
    faults_->CloseGate(kTokens);
    std::shared_ptr<Session> session = Start(probe);
    const int64_t reserved = session->reserved_bytes();
    Feed(*session, *probe, 2);
    ASSERT_TRUE(faults_->WaitUntilBlocked(kTokens));
    if (drop) {
      session.reset();
    } else {
      session->Cancel();
    }
    // The layer that is being computed still has its buffers, and so the session its reservation;
    // the second layer's are free.
    EXPECT_EQ(manager_->budget().reserved_bytes(), reserved);
    EXPECT_EQ(manager_->active_sessions(), 1);
    EXPECT_GT(manager_->buffers().in_use_bytes(), 0U);
    EXPECT_LT(manager_->buffers().in_use_bytes(), data_.total_bytes() / 2);
    faults_->OpenGate(kTokens);
    EXPECT_TRUE(Eventually([&] { return IsFree(); }));
    const Seen seen = probe->seen();
    EXPECT_THAT(seen.answer.order, IsEmpty());
    EXPECT_FALSE(seen.failed.has_value());
    EXPECT_THAT(seen.faults, IsEmpty());
  }
}

TEST_F(SessionFaultTest, ALayerThatWaitsForAThreadIsFreedAtOnce) {
  // Another prompt's layers hold both threads.
  const v1::Open other = LargeOpen(199);
  const testkit::PromptData blocking(other, 1);
  const SessionRequest request{.spec = testkit::SpecOf(other)};
  faults_->CloseGate(199);
  std::shared_ptr<Session> holders[2];
  for (std::shared_ptr<Session>& holder : holders) {
    holder = *manager_->Open(request);
    const auto probe = std::make_shared<Probe>();
    holder->Start(probe->Callbacks());
    holder->Append(MessageOf(LayerPieces(blocking, request.spec, 0)));
  }
  ASSERT_TRUE(faults_->WaitUntilBlocked(199, 2));
  const int64_t reserved = manager_->budget().reserved_bytes();
  const size_t in_use = manager_->buffers().in_use_bytes();
  const std::shared_ptr<Session> session = Start(probe_);
  Feed(*session, *probe_, 1);
  EXPECT_GT(manager_->buffers().in_use_bytes(), in_use);
  session->Cancel();
  EXPECT_EQ(manager_->budget().reserved_bytes(), reserved);
  EXPECT_EQ(manager_->buffers().in_use_bytes(), in_use);
  faults_->OpenGate(199);
}

TEST_F(SessionFaultTest, AFaultOfTheBackendInMidPrompt) {
  faults_->FailSaliency(kTokens, 2, absl::InternalError("the device is on fire"));
  const std::shared_ptr<Session> session = Start(probe_);
  std::thread neighbour([&] {
    v1::Open other = data_.open();
    other.set_prompt_tokens(150);
    const testkit::PromptData data(other, 6);
    engine::BufferPool pool(0);
    const std::unique_ptr<Backend> backend = *CreateBackend("auto");
    const absl::StatusOr<testkit::Answer> expected = testkit::CompressDirectly(
        data, *backend, &pool, testkit::InOrder(data.layers()), SerialFor);
    const absl::StatusOr<testkit::Answer> answer =
        RunPrompt(*manager_, data, {.spec = testkit::SpecOf(other)});
    ASSERT_TRUE(answer.ok()) << answer.status();
    EXPECT_TRUE(testkit::ResultBytes(*answer) == testkit::ResultBytes(*expected));
  });
  for (int64_t layer = 0; layer < 3; ++layer) {
    ASSERT_TRUE(probe_->WaitFor([&](const Seen& seen) { return seen.ready > layer; }));
    session->Append(MessageOf(LayerPieces(data_, request_.spec, layer)));
    ASSERT_TRUE(probe_->WaitFor([&](const Seen& seen) {
      return static_cast<int64_t>(seen.answer.order.size()) > layer || seen.failed.has_value();
    }));
    const int64_t unsent = probe_->seen().unsent_bytes;
    probe_->Sent(unsent);
    session->OutputSent(unsent);
  }
  const Seen seen = probe_->seen();
  EXPECT_THAT(seen.answer.order, ElementsAre(0, 1));
  ASSERT_TRUE(seen.failed.has_value());
  EXPECT_EQ(seen.failed->code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(seen.failed->message()),
              AllOf(HasSubstr("layer 2"), HasSubstr("the device is on fire")));
  neighbour.join();
  EXPECT_TRUE(Eventually([&] { return IsFree(); }));
}

// There is memory for one of the two, and the first one's layer is being computed.
TEST_F(SessionFaultTest, ANewSessionWithTheSameKeyWaitsForTheMemory) {
  const absl::StatusOr<std::shared_ptr<Session>> once = manager_->Open(request_);
  const int64_t needed = (*once)->reserved_bytes();
  (*once)->Cancel();
  Make(needed * 3 / 2);
  request_.idempotency_key = "again";
  faults_->CloseGate(kTokens);
  const std::shared_ptr<Session> first = Start(probe_);
  Feed(*first, *probe_, 1);
  ASSERT_TRUE(faults_->WaitUntilBlocked(kTokens));
  absl::StatusOr<std::shared_ptr<Session>> second = absl::UnknownError("");
  std::thread opening([&] { second = manager_->Open(request_); });
  EXPECT_TRUE(probe_->WaitFor([](const Seen& seen) { return seen.failed.has_value(); }));
  EXPECT_EQ(probe_->seen().failed->code(), absl::StatusCode::kAborted);
  faults_->OpenGate(kTokens);
  opening.join();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(manager_->budget().reserved_bytes(), needed);
  (*second)->Cancel();
  EXPECT_TRUE(Eventually([&] { return IsFree(); }));
}

// A computation that hangs keeps its memory, which a neighbour then cannot have; nothing else.
TEST_F(SessionFaultTest, ANewSessionWithTheSameKeyDoesNotWaitForever) {
  request_.idempotency_key = "again";
  faults_->CloseGate(kTokens);
  const std::shared_ptr<Session> first = Start(probe_);
  Feed(*first, *probe_, 1);
  ASSERT_TRUE(faults_->WaitUntilBlocked(kTokens));
  const auto probe = std::make_shared<Probe>();
  const std::shared_ptr<Session> second = Start(probe);
  EXPECT_EQ(manager_->active_sessions(), 2);
  EXPECT_EQ(manager_->budget().reserved_bytes(), 2 * second->reserved_bytes());
  faults_->OpenGate(kTokens);
  EXPECT_TRUE(Eventually([&] { return manager_->active_sessions() == 1; }));
}

TEST_F(SessionFaultTest, TheManagerEndsWhileALayerIsComputed) {
  faults_->CloseGate(kTokens);
  std::shared_ptr<Session> session = Start(probe_);
  Feed(*session, *probe_, 1);
  ASSERT_TRUE(faults_->WaitUntilBlocked(kTokens));
  session.reset();
  std::thread opener([&] { faults_->OpenGate(kTokens); });
  manager_.reset();  // waits for the layer
  opener.join();
  EXPECT_FALSE(probe_->seen().failed.has_value());
}

}  // namespace
}  // namespace structkv::session
