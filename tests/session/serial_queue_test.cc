#include "service/session/serial_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <thread>
#include <vector>

namespace structkv::session {
namespace {

using ::testing::ElementsAre;

TEST(SerialQueueTest, RunsATaskBeforeItReturns) {
  SerialQueue queue;
  bool ran = false;
  queue.Run([&] { ran = true; });
  EXPECT_TRUE(ran);
}

TEST(SerialQueueTest, TasksDoNotNest) {
  SerialQueue queue;
  std::vector<int> order;
  queue.Run([&] {
    order.push_back(1);
    queue.Run([&] {
      order.push_back(3);
      queue.Run([&] { order.push_back(5); });
    });
    queue.Run([&] { order.push_back(4); });
    order.push_back(2);
  });
  EXPECT_THAT(order, ElementsAre(1, 2, 3, 4, 5));
}

TEST(SerialQueueTest, ATaskIsLeftToTheThreadThatRunsOne) {
  SerialQueue queue;
  std::thread::id ran_on;
  queue.Run([&] {
    std::thread([&] {  // would not end if it waited for the running task
      queue.Run([&] { ran_on = std::this_thread::get_id(); });
    })
        .join();
    EXPECT_EQ(ran_on, std::thread::id());
  });
  EXPECT_EQ(ran_on, std::this_thread::get_id());
}

TEST(SerialQueueTest, WhatATaskHoldsMayQueueMoreWhenItGoes) {
  SerialQueue queue;
  std::vector<int> order;
  auto held = std::shared_ptr<void>(nullptr, [&](void*) {
    order.push_back(2);
    queue.Run([&] { order.push_back(3); });
  });
  queue.Run([&order, held = std::move(held)]() mutable { order.push_back(1); });
  EXPECT_THAT(order, ElementsAre(1, 2, 3));
}

TEST(SerialQueueTest, TasksOfSeveralThreadsNeverOverlapAndKeepEachThreadsOrder) {
  constexpr int kThreads = 4;
  constexpr int kTasks = 2000;
  SerialQueue queue;
  std::vector<std::vector<int>> order(kThreads);  // unguarded: the queue keeps the tasks apart
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kTasks; ++i) {
        queue.Run([&order, t, i] { order[static_cast<size_t>(t)].push_back(i); });
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  queue.Run([] {});  // after everything that other threads were left with
  for (const std::vector<int>& each : order) {
    ASSERT_EQ(each.size(), static_cast<size_t>(kTasks));
    for (int i = 0; i < kTasks; ++i) EXPECT_EQ(each[static_cast<size_t>(i)], i);
  }
}

}  // namespace
}  // namespace structkv::session
