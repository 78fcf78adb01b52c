// Random sequences of events, done to sessions and to their models alike. The seed is printed;
// STRUCTKV_TEST_SEED sets it.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/backend_registry.h"
#include "service/session/session_plan.h"
#include "tests/kernels/random_tensor.h"
#include "tests/session/session_driver.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/prompt_cases.h"

namespace structkv::session {
namespace {

// Events of one session, at most; a calm one needs far fewer.
constexpr int kMaxSteps = 2000;

struct Slot {
  std::unique_ptr<Scenario> scenario;
  std::unique_ptr<SessionDriver> driver;
};

class SessionRandomTest : public ::testing::Test {
 protected:
  void Make(int64_t budget, int64_t max_sessions, int threads) {
    manager_ = std::make_unique<SessionManager>(SessionManagerOptions{.memory_budget_bytes = budget,
                                                                      .max_sessions = max_sessions,
                                                                      .idle_buffer_bytes = 1 << 20,
                                                                      .threads = threads},
                                                MakeFaultBackend(*CreateBackend("auto"), faults_));
  }
  // After a failure layers may be held at their gates.
  ~SessionRandomTest() override { faults_->OpenAllGates(); }

  void ExpectNothingLeft() {
    EXPECT_TRUE(Eventually([&] {
      return manager_->budget().reserved_bytes() == 0 && manager_->active_sessions() == 0 &&
             manager_->buffers().in_use_bytes() == 0;
    })) << manager_->budget().reserved_bytes()
        << " bytes, " << manager_->active_sessions() << " sessions, "
        << manager_->buffers().in_use_bytes() << " bytes of buffers";
  }

  const std::shared_ptr<Faults> faults_ = std::make_shared<Faults>();
  const std::unique_ptr<Backend> plain_ = *CreateBackend("auto");
  std::unique_ptr<SessionManager> manager_;
};

// Several sessions that one thread does things to, so that the budget and the number of sessions
// are known at every step.
class World {
 public:
  World(SessionManager* manager, std::shared_ptr<Faults> faults, const Backend& backend,
        testkit::Random* random)
      : manager_(*manager), faults_(std::move(faults)), backend_(backend), random_(*random) {}

  void Step() {
    const size_t at = static_cast<size_t>(random_.Between(0, 3));
    Slot& slot = slots_[at];
    if (random_.Chance(1) && random_.Chance(20)) {
      FailAll();
    } else if (slot.driver == nullptr) {
      Open(at);
    } else {
      slot.driver->Step();
    }
    if (slot.driver != nullptr && slot.driver->over()) slot = {};
    CheckMemory();
  }
  bool OneSteps() {  // until the sessions that run are over
    bool any = false;
    for (Slot& slot : slots_) {
      if (slot.driver == nullptr) continue;
      any = true;
      slot.driver->Step();
      if (slot.driver->over()) slot = {};
    }
    CheckMemory();
    return any;
  }

 private:
  void Open(size_t at) {
    std::unique_ptr<Scenario>& scenario = slots_[at].scenario;
    if (scenario == nullptr) {  // one that was refused is tried again
      const int64_t tokens = 56 + 10 * random_.Between(0, 3) + static_cast<int64_t>(at);
      scenario = std::make_unique<Scenario>(static_cast<uint32_t>(tokens), &random_, backend_);
      if (random_.Chance(50)) scenario->request.idempotency_key = random_.Chance(50) ? "a" : "b";
    }
    const SessionRequest& request = scenario->request;
    Slot* replaced = nullptr;
    for (Slot& slot : slots_) {
      if (slot.driver == nullptr || slot.driver->model().ended()) continue;
      const std::string& key = slot.scenario->request.idempotency_key;
      if (!key.empty() && key == request.idempotency_key) replaced = &slot;
    }
    const SessionPlan plan = *PlanSession(request, backend_);
    if (plan.reserved_bytes > manager_.budget().limit_bytes()) {
      // It can never be, and so takes nobody's place.
      EXPECT_TRUE(manager_.Open(request).status().GetPayload(kNeverFits).has_value());
      scenario.reset();
      return;
    }
    // An opening waits for a layer that is being computed, and nobody else would let it go on.
    if (replaced != nullptr) replaced->driver->OpenGate();
    if (replaced != nullptr && replaced->driver->model().ended()) replaced = nullptr;
    absl::StatusOr<std::shared_ptr<Session>> session = manager_.Open(request);
    if (replaced != nullptr) {
      replaced->driver->ExpectFailure(absl::StatusCode::kAborted);
      EXPECT_TRUE(replaced->driver->over());
      *replaced = {};
    }
    if (session.ok()) {
      slots_[at].driver =
          std::make_unique<SessionDriver>(*scenario, *std::move(session), faults_, &random_);
      ++opened_;
      EXPECT_LE(Reserved(), manager_.budget().limit_bytes());
      EXPECT_LE(Active(), manager_.options().max_sessions);
      return;
    }
    EXPECT_EQ(session.status().code(), absl::StatusCode::kResourceExhausted) << session.status();
    EXPECT_TRUE(Reserved() + plan.reserved_bytes > manager_.budget().limit_bytes() ||
                Active() == manager_.options().max_sessions)
        << session.status();
    ++refused_;
  }

  void FailAll() {
    manager_.FailAll(absl::UnavailableError("a test"));
    for (Slot& slot : slots_) {
      if (slot.driver == nullptr) continue;
      slot.driver->ExpectFailure(absl::StatusCode::kUnavailable);
      if (slot.driver->over()) slot = {};
    }
  }

  int64_t Reserved() const {
    int64_t bytes = 0;
    for (const Slot& slot : slots_) {
      if (slot.driver != nullptr && !slot.driver->over()) bytes += slot.driver->reserved_bytes();
    }
    return bytes;
  }
  int64_t Active() const {
    int64_t count = 0;
    for (const Slot& slot : slots_) count += slot.driver != nullptr && !slot.driver->over() ? 1 : 0;
    return count;
  }
  void CheckMemory() {
    EXPECT_TRUE(Eventually([&] {
      return manager_.budget().reserved_bytes() == Reserved() &&
             manager_.active_sessions() == Active();
    })) << manager_.budget().reserved_bytes()
        << " bytes of " << Reserved() << ", " << manager_.active_sessions() << " sessions of "
        << Active();
  }

 public:
  int opened() const { return opened_; }
  int refused() const { return refused_; }

 private:
  SessionManager& manager_;
  const std::shared_ptr<Faults> faults_;
  const Backend& backend_;
  testkit::Random& random_;
  Slot slots_[4];
  int opened_ = 0;
  int refused_ = 0;
};

TEST_F(SessionRandomTest, SeveralSessionsOnABudgetAreAsTheirModels) {
  constexpr int kWorlds = 6;
  int opened = 0;
  int refused = 0;
  for (int i = 0; i < kWorlds; ++i) {
    const uint64_t seed = testing::Seed() + static_cast<uint64_t>(i);
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    testkit::Random random(seed);
    // A prompt reserves 0.5 to 4 MB, most of it for records of pieces.
    Make(random.Between(int64_t{2} << 20, int64_t{12} << 20), 3,
         static_cast<int>(random.Between(5, 6)));
    World world(manager_.get(), faults_, *plain_, &random);
    for (int step = 0; step < 400 && !HasFailure(); ++step) world.Step();
    for (int step = 0; step < kMaxSteps && world.OneSteps() && !HasFailure(); ++step) {
    }
    if (HasFailure()) return;
    ExpectNothingLeft();
    manager_->StartDraining();
    const Scenario scenario(50, &random, *plain_);
    EXPECT_EQ(manager_->Open(scenario.request).status().code(), absl::StatusCode::kUnavailable);
    EXPECT_TRUE(manager_->WaitUntilEmpty(absl::ZeroDuration()));
    opened += world.opened();
    refused += world.refused();
  }
  EXPECT_GT(opened, 3 * kWorlds);  // the sequences are worth something
  EXPECT_GT(refused, kWorlds);
}

// Threads that disturb their sessions, beside others whose prompts run as if they were alone.
TEST_F(SessionRandomTest, SessionsOnSeveralThreadsAreAsTheirModels) {
  constexpr int kDrivers = 4;
  constexpr int kSessions = 25;
  Make(int64_t{1} << 30, 100, kDrivers + 1);  // each gate may hold one thread
  std::atomic<int> drivers_left{kDrivers};
  std::atomic<int> finished{0};
  std::atomic<int> failed{0};
  std::atomic<int> cut_layers{0};  // of prompts that finished
  std::atomic<int> pulled_layers{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kDrivers; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kSessions && !HasFailure(); ++i) {
        const uint64_t seed = testing::Seed() + static_cast<uint64_t>(1000 * (t + 1) + i);
        SCOPED_TRACE(absl::StrCat("seed ", seed));
        testkit::Random random(seed);
        const auto tokens = static_cast<uint32_t>(56 + 10 * random.Between(0, 3) + t);
        const Scenario scenario(tokens, &random, *plain_);
        absl::StatusOr<std::shared_ptr<Session>> session = manager_->Open(scenario.request);
        ASSERT_TRUE(session.ok()) << session.status();
        SessionDriver driver(scenario, *std::move(session), faults_, &random);
        for (int step = 0; step < kMaxSteps && !driver.over(); ++step) {
          driver.Step();
          if (HasFailure()) break;
        }
        EXPECT_TRUE(driver.over());
        if (scenario.calm) {
          EXPECT_TRUE(driver.model().finished());
        }
        (driver.model().finished() ? finished : failed) += 1;
        if (driver.model().finished()) {
          cut_layers += scenario.cut_layers;
          pulled_layers += static_cast<int>(driver.model().pulls().size());
        }
        driver.OpenGate();
      }
      --drivers_left;
    });
  }
  for (const char* name : {"StructKvEverythingReturned", "SnapKv"}) {
    threads.emplace_back([&, name] {
      const testkit::PromptData data(testkit::FindCase(name).open, 5);  // of 200 tokens
      engine::BufferPool pool(0);
      const std::string undisturbed = testkit::ResultBytes(*testkit::CompressDirectly(
          data, *plain_, &pool, testkit::InOrder(data.layers()), SerialFor));
      SessionRequest request{.spec = testkit::SpecOf(data.open())};
      do {
        const absl::StatusOr<testkit::Answer> answer = RunPrompt(*manager_, data, request);
        ASSERT_TRUE(answer.ok()) << answer.status();
        EXPECT_TRUE(testkit::ResultBytes(*answer) == undisturbed) << name;
      } while (drivers_left > 0);
    });
  }
  for (std::thread& thread : threads) thread.join();
  ExpectNothingLeft();
  EXPECT_GT(finished, kDrivers * kSessions / 3);
  EXPECT_GT(failed, kDrivers * kSessions / 10);
  EXPECT_GT(cut_layers, kDrivers * kSessions / 10);
  EXPECT_GT(pulled_layers, kDrivers * kSessions / 5);
}

}  // namespace
}  // namespace structkv::session
