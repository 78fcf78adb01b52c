// Order is shown without clocks: threads are held by notifications, and what ran is recorded.
#include "service/engine/scheduler.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <latch>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace structkv::engine {
namespace {

using ::testing::Contains;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::Not;

constexpr bool kSmall = true;
constexpr bool kLarge = false;

// Of this program's own code, so that the thread sanitizer sees what it orders; a library's that
// was built without it does not show.
class Notification {
 public:
  void Notify() { latch_.count_down(); }
  bool HasBeenNotified() const { return latch_.try_wait(); }
  void WaitForNotification() const { latch_.wait(); }

 private:
  std::latch latch_{1};
};

// What happened, in order. Thread-safe.
class Record {
 public:
  void Add(std::string event) {
    const std::lock_guard lock(mutex_);
    events_.push_back(std::move(event));
  }
  std::vector<std::string> events() const {
    const std::lock_guard lock(mutex_);
    return events_;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> events_;
};

class SchedulerThreadsTest : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, SchedulerThreadsTest, ::testing::Values(1, 2, 3, 8));

TEST_P(SchedulerThreadsTest, AParallelForRunsEachTaskOnce) {
  for (const int64_t count : {0, 1, 2, 7, 1000}) {
    std::vector<std::atomic<int>> runs(count);
    {
      Scheduler scheduler(GetParam());
      EXPECT_EQ(scheduler.threads(), GetParam());
      scheduler.Post(scheduler.NewLane(), kLarge, [&](ParallelFor parallel) {
        parallel(count, [&](int64_t i) { ++runs[i]; });
        for (const auto& each : runs) EXPECT_EQ(each, 1);  // done when the call returns
      });
    }
    for (const auto& each : runs) EXPECT_EQ(each, 1);
  }
}

TEST_P(SchedulerThreadsTest, JobsOfALaneRunInOrderOneAtATime) {
  std::vector<int> order;  // unguarded: the lane is what keeps its jobs apart
  {
    Scheduler scheduler(GetParam());
    const auto lane = scheduler.NewLane();
    for (int i = 0; i < 100; ++i) {
      scheduler.Post(lane, i % 3 == 0, [&order, i](ParallelFor parallel) {
        std::atomic<int> tasks = 0;
        parallel(5, [&](int64_t) { ++tasks; });
        EXPECT_EQ(tasks, 5);
        order.push_back(i);
      });
    }
  }
  ASSERT_EQ(order.size(), 100U);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(order[i], i);
}

TEST_P(SchedulerThreadsTest, TheDestructorRunsWhatWasPostedAndWhatThatPosts) {
  std::atomic<int> ran = 0;
  {
    Scheduler scheduler(GetParam());
    for (int i = 0; i < 20; ++i) {
      const auto lane = scheduler.NewLane();
      scheduler.Post(lane, kLarge, [&scheduler, &ran, lane](ParallelFor) {
        ++ran;
        scheduler.Post(lane, kSmall, [&ran](ParallelFor) { ++ran; });
      });
    }
  }
  EXPECT_EQ(ran, 40);
}

TEST_P(SchedulerThreadsTest, ParallelForsNest) {
  std::atomic<int> leaves = 0;
  {
    Scheduler scheduler(GetParam());
    for (int i = 0; i < 3; ++i) {
      scheduler.Post(scheduler.NewLane(), kLarge, [&](ParallelFor parallel) {
        parallel(4, [&](int64_t) {
          parallel(3, [&](int64_t) { parallel(2, [&](int64_t) { ++leaves; }); });
        });
      });
    }
  }
  EXPECT_EQ(leaves, 3 * 4 * 3 * 2);
}

TEST_P(SchedulerThreadsTest, ManyLanesWithJobsOfAllKinds) {
  constexpr int kLanes = 40;
  constexpr int kJobs = 15;
  std::vector<std::vector<int>> order(kLanes);
  std::atomic<int64_t> tasks = 0;
  std::atomic<int64_t> expected = 0;
  {
    Scheduler scheduler(GetParam());
    std::vector<std::shared_ptr<Scheduler::Lane>> lanes;
    for (int i = 0; i < kLanes; ++i) lanes.push_back(scheduler.NewLane());
    std::vector<std::thread> posters;
    for (int poster = 0; poster < 4; ++poster) {
      posters.emplace_back([&, poster] {
        std::mt19937 random(poster);
        for (int job = 0; job < kJobs; ++job) {
          for (int lane = poster; lane < kLanes; lane += 4) {
            const int64_t count = random() % 20;
            const bool nested = random() % 4 == 0;
            expected += nested ? 2 * count : count;
            scheduler.Post(lanes[lane], random() % 2 == 0,
                           [&, lane, job, count, nested](ParallelFor parallel) {
                             parallel(count, [&](int64_t) {
                               if (nested) {
                                 parallel(2, [&](int64_t) { ++tasks; });
                               } else {
                                 ++tasks;
                               }
                             });
                             order[lane].push_back(job);
                           });
          }
        }
      });
    }
    for (std::thread& poster : posters) poster.join();
  }
  EXPECT_EQ(tasks, expected);
  for (const auto& jobs : order) {
    ASSERT_EQ(jobs.size(), static_cast<size_t>(kJobs));
    for (int job = 0; job < kJobs; ++job) EXPECT_EQ(jobs[job], job);
  }
}

// On one thread the order of everything is determined.
class SchedulerOrderTest : public ::testing::Test {
 protected:
  // Keeps the thread busy until Release.
  void Hold() {
    scheduler_.Post(scheduler_.NewLane(), kLarge, [this](ParallelFor) {
      held_.Notify();
      release_.WaitForNotification();
    });
    held_.WaitForNotification();
  }
  // Runs everything and gives what was recorded.
  std::vector<std::string> Finish() {
    if (!release_.HasBeenNotified()) release_.Notify();
    owned_.reset();
    return record_.events();
  }
  void Post(const std::shared_ptr<Scheduler::Lane>& lane, bool small, const std::string& name) {
    scheduler_.Post(lane, small, [this, name](ParallelFor) { record_.Add(name); });
  }

  Record record_;
  Notification held_;
  Notification release_;
  std::unique_ptr<Scheduler> owned_ = std::make_unique<Scheduler>(1);
  Scheduler& scheduler_ = *owned_;  // jobs post while the owner waits in the destructor
};

TEST_F(SchedulerOrderTest, LanesTakeTurns) {
  Hold();
  const auto a = scheduler_.NewLane();
  const auto b = scheduler_.NewLane();
  const auto c = scheduler_.NewLane();
  for (const char* name : {"a1", "a2", "a3", "a4"}) Post(a, kLarge, name);
  for (const char* name : {"b1", "b2"}) Post(b, kSmall, name);
  Post(c, kLarge, "c1");
  EXPECT_EQ(scheduler_.queue_depth(), 7);
  EXPECT_THAT(Finish(), ElementsAre("a1", "b1", "c1", "a2", "b2", "a3", "a4"));
}

TEST_F(SchedulerOrderTest, ASmallJobRunsAmidALargeOne) {
  const auto other = scheduler_.NewLane();
  scheduler_.Post(scheduler_.NewLane(), kLarge, [&](ParallelFor parallel) {
    parallel(5, [&](int64_t i) {
      record_.Add("task");
      if (i == 0) Post(other, kSmall, "small");
      if (i == 0) Post(other, kSmall, "small");
    });
    record_.Add("end");
  });
  EXPECT_THAT(Finish(),
              ElementsAre("task", "task", "small", "task", "small", "task", "task", "end"));
}

TEST_F(SchedulerOrderTest, ALargeJobNeverRunsWithinAnother) {
  const auto other = scheduler_.NewLane();
  scheduler_.Post(scheduler_.NewLane(), kLarge, [&](ParallelFor parallel) {
    parallel(3, [&](int64_t i) {
      if (i == 0) Post(other, kLarge, "large");
      record_.Add("task");
    });
    record_.Add("end");
  });
  EXPECT_THAT(Finish(), ElementsAre("task", "task", "task", "end", "large"));
}

// The second job of the other lane is large: a thread within a large job may take the first alone.
TEST_F(SchedulerOrderTest, ALargeJobBehindASmallOneWaitsAsWell) {
  const auto other = scheduler_.NewLane();
  scheduler_.Post(scheduler_.NewLane(), kLarge, [&](ParallelFor parallel) {
    parallel(4, [&](int64_t i) {
      if (i == 0) {
        Post(other, kSmall, "small");
        Post(other, kLarge, "large");
      }
      record_.Add("task");
    });
    record_.Add("end");
  });
  EXPECT_THAT(Finish(), ElementsAre("task", "task", "small", "task", "task", "end", "large"));
}

// A lane whose tasks were taken out of turn, by a nested call, still offers its next job properly.
TEST_F(SchedulerOrderTest, TheJobAfterOneWithNestedTasks) {
  const auto lane = scheduler_.NewLane();
  const auto other = scheduler_.NewLane();
  scheduler_.Post(lane, kLarge, [&](ParallelFor parallel) {
    parallel(2, [&](int64_t i) {
      if (i == 0) {
        Post(lane, kLarge, "next");
        Post(other, kLarge, "other");
      }
      parallel(2, [&](int64_t) { record_.Add("task"); });
    });
    record_.Add("end");
  });
  EXPECT_THAT(Finish(), testing::UnorderedElementsAre("task", "task", "task", "task", "end", "next",
                                                      "other"));
  EXPECT_EQ(record_.events()[4], "end");
}

TEST_F(SchedulerOrderTest, TheDepthCountsJobsThatWait) {
  EXPECT_EQ(scheduler_.queue_depth(), 0);
  Hold();
  EXPECT_EQ(scheduler_.queue_depth(), 0);  // the one that runs does not wait
  const auto lane = scheduler_.NewLane();
  for (int i = 0; i < 3; ++i) Post(lane, kLarge, "job");
  EXPECT_EQ(scheduler_.queue_depth(), 3);
  Notification last;
  int64_t depth = -1;
  scheduler_.Post(lane, kSmall, [&](ParallelFor) {
    depth = scheduler_.queue_depth();
    last.Notify();
  });
  release_.Notify();
  last.WaitForNotification();
  EXPECT_EQ(depth, 0);
}

TEST_F(SchedulerOrderTest, WhatAJobHoldsIsFreedBeforeTheNextOneRuns) {
  const auto lane = scheduler_.NewLane();
  Hold();
  auto held = std::make_shared<int>(1);
  scheduler_.Post(lane, kLarge, [held](ParallelFor) { EXPECT_EQ(*held, 1); });
  const std::weak_ptr<int> seen = held;
  held.reset();
  bool freed = false;
  scheduler_.Post(lane, kLarge, [&](ParallelFor) { freed = seen.expired(); });
  Finish();
  EXPECT_TRUE(freed);
}

TEST(SchedulerTest, ThreadsShareTheTasksOfOneJob) {
  // Each task waits for the three others: four threads, or no end.
  std::latch together(4);
  Scheduler scheduler(4);
  scheduler.Post(scheduler.NewLane(), kLarge, [&](ParallelFor parallel) {
    parallel(4, [&](int64_t) { together.arrive_and_wait(); });
  });
}

TEST(SchedulerTest, JobsOfDifferentLanesRunAtOnce) {
  std::latch together(2);
  Scheduler scheduler(2);
  for (int i = 0; i < 2; ++i) {
    scheduler.Post(scheduler.NewLane(), kLarge, [&](ParallelFor) { together.arrive_and_wait(); });
  }
}

// Both threads are within large jobs that cannot end before a small job has run.
TEST(SchedulerTest, AThreadThatWaitsWithinALargeJobTakesASmallOne) {
  for (int round = 0; round < 50; ++round) {
    Notification blocked;
    Notification small_ran;
    Scheduler scheduler(2);
    scheduler.Post(scheduler.NewLane(), kLarge, [&](ParallelFor parallel) {
      parallel(2, [&](int64_t i) {
        if (i == 1) return;
        blocked.Notify();
        small_ran.WaitForNotification();
      });
    });
    blocked.WaitForNotification();
    scheduler.Post(scheduler.NewLane(), kSmall, [&](ParallelFor) { small_ran.Notify(); });
  }
}

TEST(SchedulerTest, ASmallJobsParallelForIsSerial) {
  std::vector<int64_t> order;
  std::vector<bool> same_thread;
  Notification done;
  Scheduler scheduler(4);
  scheduler.Post(scheduler.NewLane(), kSmall, [&](ParallelFor parallel) {
    const auto self = std::this_thread::get_id();
    parallel(5, [&](int64_t i) {
      order.push_back(i);
      same_thread.push_back(std::this_thread::get_id() == self);
    });
    done.Notify();
  });
  done.WaitForNotification();
  EXPECT_THAT(order, ElementsAre(0, 1, 2, 3, 4));
  EXPECT_THAT(same_thread, Each(true));
}

// Two large jobs at once on two threads. Turns alternate, and a thread may be held up between
// taking a task and recording it; so at any time the two have had about as many.
TEST(SchedulerTest, TasksOfTwoLargeJobsAlternate) {
  constexpr int64_t kTasks = 200;
  std::mutex mutex;
  int64_t started[2] = {0, 0};
  int64_t largest_lead = 0;
  std::latch both_begun(2);
  std::latch both_started(2);
  {
    Scheduler scheduler(2);
    for (int job = 0; job < 2; ++job) {
      scheduler.Post(scheduler.NewLane(), kLarge, [&, job](ParallelFor parallel) {
        both_begun.arrive_and_wait();
        parallel(kTasks, [&, job](int64_t i) {
          // Whichever job comes first waits for the other one.
          if (i == 0) both_started.arrive_and_wait();
          const std::lock_guard lock(mutex);
          ++started[job];
          const bool both_run = started[0] < kTasks && started[1] < kTasks;
          if (both_run) largest_lead = std::max(largest_lead, std::abs(started[0] - started[1]));
        });
      });
    }
  }
  EXPECT_EQ(started[0], kTasks);
  EXPECT_EQ(started[1], kTasks);
  EXPECT_LE(largest_lead, 4);
}

TEST(SchedulerTest, ASmallJobRunsHereWhereAThreadIsIdle) {
  Scheduler scheduler(1);
  const auto lane = scheduler.NewLane();
  std::thread::id ran_on;
  std::vector<int64_t> tasks;
  Scheduler::Job job = [&](ParallelFor parallel) {
    ran_on = std::this_thread::get_id();
    parallel(3, [&](int64_t i) { tasks.push_back(i); });
  };
  EXPECT_TRUE(scheduler.TryRunHere(lane, kSmall, job));
  EXPECT_EQ(ran_on, std::this_thread::get_id());
  EXPECT_THAT(tasks, ElementsAre(0, 1, 2));
}

TEST(SchedulerTest, AJobThatRunsHereTakesTheIdleThreadsPlace) {
  Record record;
  Notification posted_ran;
  Scheduler scheduler(1);
  const auto lane = scheduler.NewLane();
  const auto other = scheduler.NewLane();
  Scheduler::Job job = [&](ParallelFor) {
    // Its lane has a job that runs; the pool's only place is taken.
    for (const auto& each : {lane, other}) {
      Scheduler::Job again = [&](ParallelFor) { record.Add("never"); };
      EXPECT_FALSE(scheduler.TryRunHere(each, kSmall, again));
      EXPECT_TRUE(again != nullptr);
    }
    scheduler.Post(lane, kSmall, [&](ParallelFor) { record.Add("same lane"); });
    scheduler.Post(other, kLarge, [&](ParallelFor) {
      record.Add("other lane");
      posted_ran.Notify();
    });
    record.Add("here");
  };
  EXPECT_TRUE(scheduler.TryRunHere(lane, kSmall, job));
  posted_ran.WaitForNotification();
  const std::vector<std::string> events = record.events();
  ASSERT_FALSE(events.empty());
  EXPECT_EQ(events.front(), "here");
  EXPECT_THAT(events, Not(Contains("never")));
}

TEST(SchedulerTest, NothingRunsHereWhereTheThreadsAreBusyOrTheLaneHasJobs) {
  Notification begun;
  Notification go_on;
  Scheduler scheduler(2);
  const auto lane = scheduler.NewLane();
  scheduler.Post(lane, kLarge, [&](ParallelFor) {
    begun.Notify();
    go_on.WaitForNotification();
  });
  begun.WaitForNotification();
  bool ran = false;
  Scheduler::Job job = [&](ParallelFor) { ran = true; };
  EXPECT_FALSE(scheduler.TryRunHere(lane, kSmall, job));  // jobs of a lane never overlap
  EXPECT_FALSE(ran);
  EXPECT_TRUE(scheduler.TryRunHere(scheduler.NewLane(), kSmall, job));  // the second thread is idle
  EXPECT_TRUE(ran);
  go_on.Notify();
}

TEST(SchedulerTest, ALargeJobThatRunsHereSharesItsTasks) {
  Scheduler scheduler(2);
  std::thread::id ran_on;
  std::latch both(2);
  std::set<std::thread::id> took;
  std::mutex mutex;
  Scheduler::Job job = [&](ParallelFor parallel) {
    ran_on = std::this_thread::get_id();
    parallel(2, [&](int64_t) {
      both.arrive_and_wait();  // neither thread takes both
      const std::lock_guard lock(mutex);
      took.insert(std::this_thread::get_id());
    });
  };
  EXPECT_TRUE(scheduler.TryRunHere(scheduler.NewLane(), kLarge, job));
  EXPECT_EQ(ran_on, std::this_thread::get_id());
  EXPECT_EQ(took.size(), 2U);
  EXPECT_THAT(took, Contains(ran_on));
}

TEST(SchedulerTest, ALargeJobThatRunsHereTakesNoOther) {
  Scheduler scheduler(2);
  Notification other_may_end;
  std::thread::id other_ran_on;
  bool other_ran = false;
  std::latch both(2);
  Scheduler::Job job = [&](ParallelFor parallel) {
    parallel(2, [&](int64_t i) {
      both.arrive_and_wait();
      if (i > 0 || other_ran) return;
      other_ran = true;
      scheduler.Post(scheduler.NewLane(), kSmall, [&](ParallelFor) {
        other_ran_on = std::this_thread::get_id();
        other_may_end.Notify();
      });
    });
  };
  EXPECT_TRUE(scheduler.TryRunHere(scheduler.NewLane(), kLarge, job));
  other_may_end.WaitForNotification();
  EXPECT_NE(other_ran_on, std::this_thread::get_id());
}

TEST(SchedulerTest, OneCallerAtATimeRunsALargeJob) {
  Scheduler scheduler(4);
  bool second_ran = false;
  std::optional<bool> taken;
  Scheduler::Job first = [&](ParallelFor) {
    std::thread other([&] {
      Scheduler::Job second = [&](ParallelFor) { second_ran = true; };
      taken = scheduler.TryRunHere(scheduler.NewLane(), kLarge, second);
    });
    other.join();
  };
  EXPECT_TRUE(scheduler.TryRunHere(scheduler.NewLane(), kLarge, first));
  EXPECT_EQ(taken, false);
  EXPECT_FALSE(second_ran);
  Scheduler::Job third = [&](ParallelFor) { second_ran = true; };
  EXPECT_TRUE(scheduler.TryRunHere(scheduler.NewLane(), kLarge, third));
  EXPECT_TRUE(second_ran);
}

TEST(SchedulerTest, NoThreadOfThePoolRunsALargeJobWithinAnother) {
  std::optional<bool> taken;
  {
    Scheduler scheduler(4);
    scheduler.Post(scheduler.NewLane(), kSmall, [&](ParallelFor) {
      Scheduler::Job large = [](ParallelFor) {};
      taken = scheduler.TryRunHere(scheduler.NewLane(), kLarge, large);
    });
  }
  EXPECT_EQ(taken, false);
}

}  // namespace
}  // namespace structkv::engine
