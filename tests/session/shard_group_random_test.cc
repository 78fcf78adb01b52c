// Random sequences of events, done to the ranks of shard groups and to their models alike: who
// succeeds, who fails and why, and that all memory comes back. The seed is printed;
// STRUCTKV_TEST_SEED sets it.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/backend_registry.h"
#include "tests/kernels/random_tensor.h"
#include "tests/session/group_driver.h"

namespace structkv::session {
namespace {

class ShardGroupRandomTest : public ::testing::Test {
 protected:
  void Make(int64_t budget, int threads) {
    manager_ = std::make_unique<SessionManager>(
        SessionManagerOptions{
            .memory_budget_bytes = budget, .idle_buffer_bytes = 1 << 20, .threads = threads},
        *CreateBackend("auto"));
  }
  void ExpectHeld(int64_t bytes, int64_t sessions) {
    EXPECT_TRUE(Eventually([&] {
      return manager_->budget().reserved_bytes() == bytes &&
             manager_->active_sessions() == sessions &&
             (sessions > 0 || manager_->buffers().in_use_bytes() == 0);
    })) << manager_->budget().reserved_bytes()
        << " bytes of " << bytes << ", " << manager_->active_sessions() << " sessions of "
        << sessions << ", " << manager_->buffers().in_use_bytes() << " bytes of buffers";
  }

  std::unique_ptr<SessionManager> manager_;
};

// Several groups that one thread does things to, so that all is known at every step.
TEST_F(ShardGroupRandomTest, GroupsOnABudgetAreAsTheirModels) {
  struct Slot {
    std::unique_ptr<GroupScenario> scenario;
    std::unique_ptr<GroupDriver> driver;
  };
  constexpr int kWorlds = 12;
  int finished = 0;
  int failed = 0;
  int never_filled = 0;
  for (int world = 0; world < kWorlds; ++world) {
    const uint64_t seed = testing::Seed() + static_cast<uint64_t>(world);
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    testkit::Random random(seed);
    Make(random.Between(int64_t{8} << 20, int64_t{32} << 20), static_cast<int>(world % 3) + 1);
    std::array<Slot, 3> slots;
    const auto step = [&](Slot& slot, auto&& event) {
      event();
      int64_t bytes = 0;
      int64_t sessions = 0;
      for (const Slot& each : slots) {
        if (each.driver == nullptr) continue;
        bytes += each.driver->reserved_bytes();
        sessions += each.driver->active_sessions();
      }
      SCOPED_TRACE(slot.driver->log());
      ExpectHeld(bytes, sessions);
      if (!slot.driver->over()) return;
      if (slot.scenario->calm && !HasFailure()) {
        EXPECT_TRUE(slot.driver->finished());
      }
      (slot.driver->finished() ? finished : failed) += 1;
      slot = {};
    };
    for (int i = 0; i < 500 && !HasFailure(); ++i) {
      Slot& slot = slots[static_cast<size_t>(random.Between(0, 2))];
      if (slot.driver == nullptr) {
        const std::string id = absl::StrCat("group ", &slot - slots.data());
        const auto tokens = static_cast<uint32_t>(random.Between(30, 120));
        slot.scenario = std::make_unique<GroupScenario>(id, tokens, &random, manager_->backend());
        slot.driver = std::make_unique<GroupDriver>(*slot.scenario, manager_.get(), &random);
      }
      step(slot, [&] { slot.driver->Step(); });
    }
    manager_->StartDraining();  // those that wait never fill
    for (Slot& slot : slots) {
      if (slot.driver == nullptr || HasFailure()) continue;
      never_filled += slot.driver->waits() ? 1 : 0;
      slot.driver->ExpectWaitEnded(absl::StatusCode::kUnavailable);
    }
    ASSERT_FALSE(HasFailure());
    for (Slot& slot : slots) slot.driver.reset();
    ExpectHeld(0, 0);
  }
  EXPECT_GT(finished, kWorlds);  // the sequences are worth something
  EXPECT_GT(failed, kWorlds);
  EXPECT_GT(never_filled, kWorlds / 4);
}

// How a rank ended that ran on a thread of its own.
struct RankEnd {
  std::optional<absl::Status> refused;  // its opening
  Seen seen;
};

// Sends its layers as it is asked, `messages` of them and no commit where it is to go wrong.
RankEnd RunRank(SessionManager& manager, const GroupScenario& scenario, int64_t rank,
                std::optional<int64_t> messages, testkit::Random random) {
  const absl::StatusOr<std::shared_ptr<Session>> session = manager.Open(scenario.Request(rank));
  if (!session.ok()) return {.refused = session.status(), .seen = {}};
  const auto probe = std::make_shared<Probe>();
  (*session)->Start(probe->Callbacks());
  const auto& part = scenario.parts[static_cast<size_t>(rank)];
  int64_t sent = 0;
  bool over = false;
  EXPECT_TRUE(Eventually([&] {
    // Where one goes wrong the others may wait for it in vain.
    if (!scenario.calm) (*session)->CheckPeers(absl::Milliseconds(50));
    int64_t unsent_bytes = 0;
    const bool asked = probe->Is([&](const Seen& seen) {
      unsent_bytes = seen.unsent_bytes;
      over = seen.finished.has_value() || seen.failed.has_value();
      return !over && seen.ready > sent;
    });
    probe->Sent(unsent_bytes);
    (*session)->OutputSent(unsent_bytes);
    if (!asked) return over && unsent_bytes == 0;
    if (sent == messages) {
      if (random.Chance(50)) {
        (*session)->Cancel();
        return true;
      }
      (*session)->Fail(absl::InternalError("a test"));
    } else if (sent < scenario.layers()) {
      const auto pieces = LayerPieces(part, scenario.own[static_cast<size_t>(rank)], sent);
      (*session)->Append(MessageOf(pieces));
    } else {
      (*session)->Commit(scenario.layers(), static_cast<int64_t>(part.total_bytes()));
    }
    ++sent;
    return false;
  }));
  return {.refused = std::nullopt, .seen = probe->seen()};
}

// Every rank on a thread of its own, several groups at a time. Where one goes wrong nobody
// succeeds, whoever was quicker.
TEST_F(ShardGroupRandomTest, RanksOnThreadsSucceedOrFailTogether) {
  constexpr int kDrivers = 3;
  constexpr int kGroups = 12;
  Make(int64_t{1} << 30, 3);
  std::vector<std::thread> drivers;
  for (int driver = 0; driver < kDrivers; ++driver) {
    drivers.emplace_back([&, driver] {
      for (int i = 0; i < kGroups && !HasFailure(); ++i) {
        const uint64_t seed = testing::Seed() + static_cast<uint64_t>(1000 * (driver + 1) + i);
        SCOPED_TRACE(absl::StrCat("seed ", seed));
        testkit::Random random(seed);
        const GroupScenario scenario(absl::StrCat("group ", seed), 80, &random,
                                     manager_->backend());
        const int64_t culprit = random.Between(0, scenario.ranks() - 1);
        const int64_t messages = random.Between(0, scenario.layers());
        std::vector<RankEnd> ends(static_cast<size_t>(scenario.ranks()));
        std::vector<std::thread> ranks;
        for (int64_t rank = 0; rank < scenario.ranks(); ++rank) {
          std::optional<int64_t> until;
          if (!scenario.calm && rank == culprit) until = messages;
          ranks.emplace_back([&, rank, until, own = random.Next()] {
            ends[static_cast<size_t>(rank)] =
                RunRank(*manager_, scenario, rank, until, testkit::Random(own));
          });
        }
        for (std::thread& rank : ranks) rank.join();
        for (size_t rank = 0; rank < ends.size(); ++rank) {
          SCOPED_TRACE(absl::StrCat("rank ", rank));
          const Seen& seen = ends[rank].seen;
          EXPECT_FALSE(ends[rank].refused.has_value()) << *ends[rank].refused;
          EXPECT_TRUE(seen.faults.empty()) << ::testing::PrintToString(seen.faults);
          EXPECT_EQ(seen.finished.has_value(), scenario.calm);
          if (scenario.calm) {
            EXPECT_TRUE(testkit::ResultBytes(seen.answer) ==
                        testkit::ResultBytes(scenario.expected[rank]));
          }
        }
      }
    });
  }
  for (std::thread& driver : drivers) driver.join();
  ExpectHeld(0, 0);
}

}  // namespace
}  // namespace structkv::session
