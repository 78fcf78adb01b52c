// Which of several replicas a prompt goes to: a table of them, with a clock of the test's own.
#include "client/cpp/replica_table.h"

#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/cpp/replica_set.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace structkv::client::internal {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr uint64_t kLimit = 1000;

v1::GetLoadResponse Load(uint64_t reserved, bool draining = false) {
  v1::GetLoadResponse load;
  load.set_reserved_bytes(reserved);
  load.set_limit_bytes(kLimit);
  load.set_max_sessions(100);
  load.set_draining(draining);
  return load;
}

class ReplicaTableTest : public ::testing::Test {
 protected:
  ReplicaTableTest() { table_.SetAddresses({"a", "b", "c"}); }

  // All that are due answer, with what they have reserved.
  void Answer(const std::map<std::string, uint64_t>& reserved) {
    for (const std::string& address : table_.TakeDue(now_)) {
      table_.OnLoad(address, Load(reserved.at(address)), now_);
    }
  }
  void Fail(const std::string& address) {
    table_.OnFailure(address, absl::UnavailableError("refused"), now_, now_);
  }
  void Pass(absl::Duration time) { now_ += time; }
  std::string Choose(const PlacementRequest& request = {}, bool impatient = false) {
    const auto chosen = table_.Choose(request, now_, impatient);
    if (!chosen.ok()) return std::string(chosen.status().message());
    return chosen->value_or("wait");
  }
  std::map<std::string, int> ChooseOften(int times) {
    std::map<std::string, int> counts;
    for (int i = 0; i < times; ++i) ++counts[Choose()];
    return counts;
  }

  const ReplicaOptions options_;
  absl::Duration now_ = absl::Seconds(100);
  ReplicaTable table_{options_, 1};
};

TEST_F(ReplicaTableTest, NothingIsKnownBeforeTheyWereAsked) {
  EXPECT_THAT(table_.TakeDue(now_), ElementsAre("a", "b", "c"));
  EXPECT_THAT(table_.TakeDue(now_), IsEmpty());  // each is asked once
  EXPECT_EQ(Choose(), "wait");
  table_.OnLoad("b", Load(500), now_);
  EXPECT_EQ(Choose(), "wait");
  // Those that were never heard of hold nobody up for long.
  EXPECT_EQ(Choose({}, /*impatient=*/true), "b");
}

TEST_F(ReplicaTableTest, TheLeastReservedIsTaken) {
  Answer({{"a", 700}, {"b", 300}, {"c", 500}});
  EXPECT_THAT(ChooseOften(20), ElementsAre(std::pair("b", 20)));
  EXPECT_EQ(Choose({.tried = {"b"}}), "c");
  EXPECT_EQ(Choose({.tried = {"b", "c"}}), "a");
  EXPECT_EQ(Choose({.tried = {"a", "b", "c"}}),
            "no replica can take the prompt: there is no other one");
}

TEST_F(ReplicaTableTest, AmongEqualsChanceDecides) {
  Answer({{"a", 320}, {"b", 300}, {"c", 500}});
  const std::map<std::string, int> counts = ChooseOften(200);
  EXPECT_EQ(counts.size(), 2U);
  EXPECT_GT(counts.at("a"), 50);
  EXPECT_GT(counts.at("b"), 50);
}

TEST_F(ReplicaTableTest, AnAddressThatIsGivenTwiceIsOne) {
  Answer({{"a", 700}, {"b", 300}, {"c", 500}});
  table_.SetAddresses({"b", "c", "b"});
  EXPECT_EQ(table_.Report().size(), 2U);
  EXPECT_THAT(table_.TakeDue(now_), IsEmpty());  // what it said is still known
  EXPECT_EQ(Choose(), "b");
}

// Keys and values of the layers in flight, two unless the prompt says otherwise.
TEST(EstimatedBytesTest, IsWhatLayersInFlightTake) {
  v1::Open open;
  open.set_prompt_tokens(100);
  open.set_dtype(v1::DTYPE_F16);
  open.mutable_geometry()->set_layer_count(8);
  open.mutable_geometry()->set_kv_head_count(2);
  open.mutable_geometry()->set_query_head_count(4);
  open.mutable_geometry()->set_key_dim(16);
  open.mutable_geometry()->set_value_dim(8);
  EXPECT_EQ(EstimatedBytes(open), 2U * 100 * 2 * (16 + 8) * 2);
  open.set_layers_in_flight(5);
  EXPECT_EQ(EstimatedBytes(open), 5U * 100 * 2 * (16 + 8) * 2);
}

// Between two answers a burst does not all go to one.
TEST_F(ReplicaTableTest, WhatTheClientOpensItselfCounts) {
  Answer({{"a", 0}, {"b", 200}, {"c", 200}});
  std::map<std::string, int> counts;
  for (int i = 0; i < 30; ++i) {
    const std::string address = Choose();
    ++counts[address];
    table_.Begin(address, 50);
  }
  // 30 prompts of 50 on top of 400 are a third each, within one of them and what counts as equal.
  EXPECT_GE(counts["a"], 10);
  EXPECT_GE(counts["b"], 7);
  EXPECT_GE(counts["c"], 7);
}

TEST_F(ReplicaTableTest, AnAnswerCountsWhatWasOpenBeforeItWasAsked) {
  table_.SetAddresses({"a", "b"});
  Answer({{"a", 0}, {"b", 400}});
  const uint64_t prompt = table_.Begin("a", 100);
  EXPECT_EQ(Choose(), "a");
  table_.Open(prompt, 600, now_);  // more than was thought
  EXPECT_EQ(Choose(), "a");        // asked at this very moment: it is in the answer
  Pass(absl::Milliseconds(1));
  const uint64_t second = table_.Begin("a", 0);
  table_.Open(second, 600, now_);
  EXPECT_EQ(Choose(), "b");
  Pass(absl::Seconds(1));
  Answer({{"a", 600}, {"b", 700}});
  EXPECT_EQ(Choose(), "a");  // both are in the answer, and not counted twice
  Pass(absl::Milliseconds(1));
  table_.End(second, now_);
  const uint64_t third = table_.Begin("b", 1);
  table_.End(third, now_);
  EXPECT_EQ(Choose(), "a");
  Pass(absl::Seconds(1));
  Answer({{"a", 800}, {"b", 700}});
  EXPECT_EQ(Choose(), "b");  // what had ended by then is not taken off again
}

TEST_F(ReplicaTableTest, OldAnswersAreAskedForAnew) {
  Answer({{"a", 100}, {"b", 300}, {"c", 500}});
  Pass(options_.load_interval);
  EXPECT_THAT(table_.TakeDue(now_), IsEmpty());
  Pass(absl::Milliseconds(1));
  EXPECT_THAT(table_.TakeDue(now_), ElementsAre("a", "b", "c"));
  EXPECT_EQ(Choose(), "wait");
  EXPECT_EQ(Choose({}, /*impatient=*/true), "a");
  table_.OnLoad("a", Load(400), now_);
  table_.OnLoad("b", Load(100), now_);
  EXPECT_EQ(Choose({}, /*impatient=*/true), "b");
}

TEST_F(ReplicaTableTest, DrainingAndFullOnesAreLeftOut) {
  Answer({{"a", 0}, {"b", 300}, {"c", 500}});
  Pass(absl::Seconds(1));
  table_.TakeDue(now_);
  table_.OnLoad("a", Load(0, /*draining=*/true), now_);
  v1::GetLoadResponse sessions = Load(0);
  sessions.set_active_sessions(100);
  table_.OnLoad("b", sessions, now_);
  table_.OnLoad("c", Load(500), now_);
  EXPECT_EQ(Choose(), "c");
  EXPECT_EQ(Choose({.tried = {"c"}}), "b");  // none has room: it says when to come again
  table_.OnLoad("b", Load(0), now_);
  table_.SetFull("b", now_ + absl::Milliseconds(200));
  EXPECT_EQ(Choose(), "c");
  Pass(absl::Milliseconds(200));
  EXPECT_EQ(Choose(), "b");
  EXPECT_EQ(Choose({.tried = {"b", "c"}}), "no replica can take the prompt: a: it is draining");
}

TEST_F(ReplicaTableTest, FailedOnesAreAskedLessAndLessOften) {
  table_.SetAddresses({"a", "b"});
  table_.TakeDue(now_);
  table_.OnLoad("b", Load(900), now_);
  Fail("a");
  std::vector<int64_t> waits;
  for (int i = 0; i < 5; ++i) {
    absl::Duration wait;
    while (true) {
      table_.OnLoad("b", Load(900), now_);
      const std::vector<std::string> due = table_.TakeDue(now_);
      if (!due.empty()) break;
      EXPECT_EQ(Choose(), "b");
      Pass(absl::Milliseconds(10));
      wait += absl::Milliseconds(10);
    }
    waits.push_back(absl::ToInt64Milliseconds(wait));
    EXPECT_EQ(Choose(), "b");  // nobody waits for it
    Fail("a");
  }
  EXPECT_THAT(waits, ElementsAre(250, 500, 1000, 2000, 2000));
  Pass(absl::Seconds(2));
  Answer({{"a", 0}, {"b", 900}});
  EXPECT_EQ(Choose(), "a");
}

TEST_F(ReplicaTableTest, ABrokenStreamHasTheReplicaAskedAtOnce) {
  Answer({{"a", 0}, {"b", 300}, {"c", 500}});
  Pass(absl::Milliseconds(1));
  table_.Suspect("a", absl::UnavailableError("reset"), now_);
  EXPECT_EQ(Choose(), "b");
  EXPECT_THAT(table_.TakeDue(now_), ElementsAre("a"));
  // An answer to an earlier question says nothing.
  table_.OnLoad("a", Load(0), now_ - absl::Milliseconds(1));
  EXPECT_EQ(Choose(), "b");
  EXPECT_THAT(table_.TakeDue(now_), ElementsAre("a"));
  table_.OnLoad("a", Load(0), now_);
  EXPECT_EQ(Choose(), "a");
}

TEST_F(ReplicaTableTest, WhereAllHaveFailedTheReasonsAreGiven) {
  table_.TakeDue(now_);
  Fail("a");
  Fail("b");
  EXPECT_EQ(Choose(), "wait");
  table_.OnLoad("c", Load(0, /*draining=*/true), now_);
  EXPECT_EQ(Choose(), "no replica can take the prompt: a: refused; b: refused; c: it is draining");
  EXPECT_TRUE(absl::IsUnavailable(table_.Choose({}, now_, false).status()));
  table_.SetAddresses({"a"});
  Pass(absl::Seconds(1));
  table_.TakeDue(now_);
  EXPECT_EQ(Choose(), "wait");  // the last hope is waited for
  table_.OnFailure("a", absl::UnauthenticatedError("no token"), now_, now_);
  EXPECT_TRUE(absl::IsUnauthenticated(table_.Choose({}, now_, false).status()));
}

TEST_F(ReplicaTableTest, OfGoneReplicasNothingIsLeft) {
  Answer({{"a", 0}, {"b", 300}, {"c", 500}});
  const uint64_t prompt = table_.Begin("a", 10);
  table_.SetAddresses({"b", "c", "d"});
  EXPECT_THAT(table_.TakeDue(now_), ElementsAre("d"));
  EXPECT_EQ(Choose({}, /*impatient=*/true), "b");
  table_.OnLoad("a", Load(0), now_);  // too late
  table_.Open(prompt, 10, now_);
  table_.End(prompt, now_);
  table_.OnLoad("d", Load(0), now_);
  EXPECT_EQ(Choose(), "d");
  std::vector<std::string> addresses;
  for (const ReplicaState& state : table_.Report()) addresses.push_back(state.address);
  EXPECT_THAT(addresses, ElementsAre("b", "c", "d"));
}

TEST_F(ReplicaTableTest, HeldCachesHaveABudgetOfTheirOwn) {
  table_.SetAddresses({"a", "b"});
  table_.TakeDue(now_);
  v1::GetLoadResponse load = Load(100);
  load.set_hold_limit_bytes(100);
  load.set_hold_reserved_bytes(90);
  table_.OnLoad("a", load, now_);
  load = Load(500);
  load.set_hold_limit_bytes(100);
  load.set_hold_reserved_bytes(10);
  table_.OnLoad("b", load, now_);
  EXPECT_EQ(Choose(), "a");
  EXPECT_EQ(Choose({.holds = true}), "b");
}

// A table of another process.
TEST_F(ReplicaTableTest, RanksOfAGroupMeetWhateverTheLoad) {
  ReplicaTable other(options_, 2);
  other.SetAddresses({"c", "b", "a"});
  Answer({{"a", 0}, {"b", 300}, {"c", 500}});
  for (const std::string& address : other.TakeDue(now_)) {
    other.OnLoad(address, Load(address == "a" ? 900 : 0), now_);
  }
  std::map<std::string, int> counts;
  for (int i = 0; i < 300; ++i) {
    const PlacementRequest request = {.group = absl::StrCat("group ", i)};
    const std::string address = Choose(request);
    ++counts[address];
    EXPECT_EQ(**other.Choose(request, now_, false), address);
  }
  for (const char* address : {"a", "b", "c"}) EXPECT_GT(counts[address], 70) << address;
}

// With one replica less, or more, only its own groups go elsewhere.
TEST_F(ReplicaTableTest, OtherGroupsStayWhereTheyAre) {
  Answer({{"a", 0}, {"b", 0}, {"c", 0}});
  std::map<std::string, std::string> before;
  for (int i = 0; i < 100; ++i) {
    const std::string group = absl::StrCat("group ", i);
    before[group] = Choose({.group = group});
  }
  Pass(absl::Seconds(1));
  table_.TakeDue(now_);
  table_.OnLoad("a", Load(0), now_);
  table_.OnLoad("c", Load(0), now_);
  Fail("b");
  // An answer that may change it is waited for: the other ranks may find the replica well.
  Pass(options_.initial_backoff);
  EXPECT_THAT(table_.TakeDue(now_), ElementsAre("b"));
  int waits = 0;
  for (const auto& [group, address] : before) waits += Choose({.group = group}) == "wait" ? 1 : 0;
  EXPECT_GT(waits, 0);
  Fail("b");
  for (const auto& [group, address] : before) {
    const std::string now = Choose({.group = group});
    EXPECT_NE(now, "b");
    EXPECT_NE(now, "wait");
    if (address != "b") {
      EXPECT_EQ(now, address);
    }
  }
}

}  // namespace
}  // namespace structkv::client::internal
