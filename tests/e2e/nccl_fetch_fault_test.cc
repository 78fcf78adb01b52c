// What goes wrong with a pair while it fetches fails that fetch alone: neighbours, in messages and
// over another pair, get the bytes that they would have got, and all memory comes back.
#include <csignal>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/engine/scheduler.h"
#include "tests/e2e/held_test.h"
#include "tests/testing/nccl_fault_test.h"
#include "tests/testing/nccl_fetch.h"

namespace structkv::testkit {
namespace {

using nccl::testing::FaultNext;

constexpr auto kUnavailable = grpc::StatusCode::UNAVAILABLE;

class NcclFetchFaultTest : public HoldingTest<NcclBesideTest> {
 protected:
  void SetUp() override {
    HoldingTest<NcclBesideTest>::SetUp();
    handle_ = Hold(PromptData(WideOpen(), 3)).summary->held().handle();
    expected_ = Fetch(channel(), FetchRequest(handle_)).bytes;
  }
  void TearDown() override {
    // Others fetch as ever.
    {
      NcclClient client(NewChannel(target()), "next");
      ExpectGood(FetchByPair(channel(), &client, FetchRequest(handle_)));
    }
    EXPECT_TRUE(Release(channel(), handle_).ok());
    EXPECT_TRUE(Eventually([&] { return held_bytes() == 0; }));
    HoldingTest<NcclBesideTest>::TearDown();
  }

  void ExpectGood(const Fetched& fetched) {
    EXPECT_TRUE(fetched.status.ok()) << fetched.status.error_message();
    EXPECT_THAT(fetched.faults, ::testing::IsEmpty());
    EXPECT_TRUE(fetched.bytes == expected_);
  }
  // A fetch with the fault `fault` of its pair's next communicator.
  void ExpectFault(const std::string& fault, const std::vector<std::string>& texts) {
    NcclClient client(NewChannel(target()), "faulty");
    FaultNext(fault);
    ExpectFetchFailure(FetchByPair(channel(), &client, FetchRequest(handle_)), kUnavailable, texts);
  }

  std::string handle_;
  std::string expected_;
};

TEST_F(NcclFetchFaultTest, TheClientNeverJoins) {
  ExpectFault("never_join@1", {"connecting took longer than 2s"});
}

TEST_F(NcclFetchFaultTest, ATransferHangs) {
  ExpectFault("hang@0", {"a group of transfers took longer than 2s"});
}

TEST_F(NcclFetchFaultTest, NcclReportsAnError) {
  ExpectFault("async_error@0", {"remote process exited or there was a network error"});
}

// The fetch's memory of the GPU is NCCL's until the abort has returned, and nobody else's.
TEST_F(NcclFetchFaultTest, AnAbortTakesItsTime) {
  setenv("FAKE_NCCL_ABORT_MILLIS", "3000", 1);
  const Backend& backend = server().sessions().backend();
  const auto free = [&backend] {
    std::vector<std::shared_ptr<std::byte>> taken;
    for (auto one = backend.Reserve(0, 64 << 10); one.ok(); one = backend.Reserve(0, 64 << 10)) {
      taken.push_back(*std::move(one));
    }
    return taken.size();
  };
  const size_t before = free();
  ExpectFault("slow_abort@0", {"a group of transfers took longer than 2s"});
  EXPECT_LT(free(), before);
  EXPECT_TRUE(Eventually([&] { return free() == before; }));
}

// Holds up all threads that compute, until the end of the object.
class BusyThreads {
 public:
  explicit BusyThreads(engine::Scheduler* scheduler) {
    absl::BlockingCounter busy(scheduler->threads());
    for (int i = 0; i < scheduler->threads(); ++i) {
      scheduler->Post(scheduler->NewLane(), /*small=*/false, [&busy, over = over_](ParallelFor) {
        busy.DecrementCount();
        over->WaitForNotification();
      });
    }
    busy.Wait();
  }
  ~BusyThreads() { over_->Notify(); }
  BusyThreads(const BusyThreads&) = delete;
  BusyThreads& operator=(const BusyThreads&) = delete;

 private:
  const std::shared_ptr<absl::Notification> over_ = std::make_shared<absl::Notification>();
};

// Two layers' transfers fail while a message is being written, and the stream cannot be told, since
// nothing computes. The rows of the next layer must not be put where NCCL may still touch them.
TEST_F(NcclFetchFaultTest, ItFailsWhileTheComputeThreadsAreBusy) {
  setenv("FAKE_NCCL_ABORT_MILLIS", "3000", 1);
  // Positions of a layer are more than a stream's window.
  v1::Open open = SmallOpen(26'000);
  open.mutable_geometry()->set_query_head_count(1);
  open.mutable_geometry()->set_kv_head_count(1);
  open.mutable_method()->mutable_full();
  const std::string handle = Hold(PromptData(open, 3)).summary->held().handle();
  engine::Scheduler& scheduler = server().sessions().scheduler();
  NcclClient client(NewChannel(target()), "faulty");
  FaultNext("slow_abort@0");
  NcclFetch fetch(NewChannel(target()), &client, FetchRequest(handle));
  ASSERT_NE(fetch.ReadOne(), nullptr);  // info
  const v1::FetchCacheResponse* const first = fetch.ReadOne();
  ASSERT_NE(first, nullptr);
  std::string key;
  std::vector<std::string> rows;
  for (const v1::TensorPiece& piece : first->layer().pieces()) {
    if (!piece.has_transfer()) continue;
    key = piece.transfer().key();
    rows.emplace_back(piece.transfer().size_bytes(), '\0');
  }
  ASSERT_EQ(rows.size(), 2);
  ASSERT_EQ(key.back(), '0');
  key.back() = '1';  // the next layer's, whose message is not read yet
  NcclMoves moves(&client);
  {
    const BusyThreads busy(&scheduler);
    fetch.TakeRows();
    moves.Offer(key, nccl::Direction::kReceive, std::move(rows));
    EXPECT_TRUE(Eventually([&] { return scheduler.queue_depth() > 0; }, std::chrono::seconds(60)));
    ASSERT_NE(fetch.ReadOne(), nullptr);
    std::this_thread::sleep_for(std::chrono::milliseconds(200));  // the server could go on
  }
  ExpectFetchFailure(fetch.Finish(), kUnavailable, {"a group of transfers took longer than 2s"});
  EXPECT_TRUE(Release(channel(), handle).ok());
}

TEST_F(NcclFetchFaultTest, ThePairEndsInMidFetch) {
  NcclClient client(NewChannel(target()), "leaves");
  NcclFetch fetch(channel(), &client, FetchRequest(handle_));
  for (int i = 0; i < 2; ++i) ASSERT_NE(fetch.ReadOne(), nullptr);  // info, a layer
  v1::FetchCacheRequest again = ByPair(FetchRequest(handle_), client);
  client.Detach();
  const Fetched fetched = fetch.Finish();
  ExpectFetchFailure(fetched, kUnavailable, {"the client gave up: the client ended the pair"});
  ExpectFetchFailure(Fetch(channel(), again), grpc::StatusCode::NOT_FOUND,
                     {"nccl_pair: NCCL pair"});
}

TEST_F(NcclFetchFaultTest, TheClientNeverOffers) {
  NcclClient client(NewChannel(target()), "silent");
  NcclFetch fetch(channel(), &client, FetchRequest(handle_));
  // Two layers are on their way at most.
  int messages = 0;
  while (fetch.ReadOne() != nullptr) ++messages;
  EXPECT_EQ(messages, 3);
  ExpectFetchFailure(fetch.Finish(), grpc::StatusCode::DEADLINE_EXCEEDED,
                     {"transfer 'result/", "the client did not offer it within the limit of 2s"});
  // The pair goes on.
  ExpectGood(FetchByPair(channel(), &client, FetchRequest(handle_)));
}

TEST_F(NcclFetchFaultTest, AnOfferOfOtherLengths) {
  NcclClient client(NewChannel(target()), "other");
  NcclFetch fetch(channel(), &client, FetchRequest(handle_));
  for (int i = 0; i < 2; ++i) ASSERT_NE(fetch.ReadOne(), nullptr);
  fetch.TakeRows(/*extra_bytes=*/1);
  ExpectFetchFailure(fetch.Finish(), grpc::StatusCode::INVALID_ARGUMENT,
                     {"transfer 'result/", "buffer 0 has "});
  ExpectGood(FetchByPair(channel(), &client, FetchRequest(handle_)));
}

TEST_F(NcclFetchFaultTest, TheClientCancels) {
  NcclClient client(NewChannel(target()), "cancels");
  for (int messages = 1; messages <= 4; ++messages) {
    SCOPED_TRACE(messages);
    NcclFetch fetch(channel(), &client, FetchRequest(handle_));
    for (int i = 0; i < messages; ++i) {
      ASSERT_NE(fetch.ReadOne(), nullptr);
      fetch.TakeRows();
    }
    fetch.Cancel();
    EXPECT_EQ(fetch.Finish().status.error_code(), grpc::StatusCode::CANCELLED);
  }
  EXPECT_TRUE(Eventually([&] { return server().active_streams() == 2; }));  // the neighbours'
  ExpectGood(FetchByPair(channel(), &client, FetchRequest(handle_)));
}

TEST_F(NcclFetchFaultTest, TheClientDiesInMidFetch) {
  setenv("FAKE_NCCL_FAULT", "die", 1);
  Process client({STRUCTKV_NCCL_CLIENT, target(), std::to_string(NcclWorkerOptions().group_bytes),
                  absl::BytesToHexString(handle_)});
  unsetenv("FAKE_NCCL_FAULT");
  EXPECT_EQ(client.Wait(std::chrono::seconds(60)), 9) << client.output() << client.error();
}

TEST_F(NcclFetchFaultTest, TheClientIsKilledInMidTransfer) {
  setenv("FAKE_NCCL_FAULT", "hang", 1);
  Process client({STRUCTKV_NCCL_CLIENT, target(), std::to_string(NcclWorkerOptions().group_bytes),
                  absl::BytesToHexString(handle_)});
  unsetenv("FAKE_NCCL_FAULT");
  ASSERT_TRUE(client.WaitForLine("sent").has_value()) << client.error();
  // The first transfer makes the communicator, at both ends; it is under way soon after.
  EXPECT_TRUE(Eventually([&] { return nccl::testing::LiveComms() == comms() + 1; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  client.Signal(SIGKILL);
  EXPECT_EQ(client.Wait(), 128 + SIGKILL);
}

class NcclFetchEndTest : public HoldingTest<NcclTest> {
 protected:
  void SetUp() override {
    StartNccl();
    handle_ = Hold(PromptData(WideOpen(), 3)).summary->held().handle();
    expected_ = Fetch(channel(), FetchRequest(handle_)).bytes;
  }
  std::string handle_;
  std::string expected_;
};

TEST_F(NcclFetchEndTest, ADrainWaitsForIt) {
  NcclClient client(NewChannel(target()), "client");
  NcclFetch fetch(channel(), &client, FetchRequest(handle_));
  ASSERT_NE(fetch.ReadOne(), nullptr);
  EXPECT_TRUE(Release(channel(), handle_).ok());
  bool finished = false;
  std::thread drain([&] { finished = server().Drain(absl::Seconds(20)); });
  EXPECT_TRUE(Eventually([&] { return server().sessions().draining(); }));
  const Fetched fetched = fetch.Finish();
  EXPECT_TRUE(fetched.status.ok()) << fetched.status.error_message();
  EXPECT_TRUE(fetched.bytes == expected_);
  drain.join();
  EXPECT_TRUE(finished);
}

// A decode worker that comes for a held cache attaches its GPU to a server that drains.
TEST_F(NcclFetchEndTest, ADrainWaitsForAGpuThatComesLate) {
  bool finished = false;
  std::thread drain([&] { finished = server().Drain(absl::Seconds(60)); });
  EXPECT_TRUE(Eventually([&] { return server().sessions().draining(); }));
  NcclClient client(NewChannel(target()), "late");
  NcclFetch fetch(channel(), &client, FetchRequest(handle_));
  const Fetched fetched = fetch.Finish();
  EXPECT_TRUE(fetched.status.ok()) << fetched.status.error_message();
  EXPECT_TRUE(fetched.bytes == expected_);
  EXPECT_TRUE(Release(channel(), handle_).ok());
  drain.join();
  EXPECT_TRUE(finished);
}

TEST_F(NcclFetchEndTest, TheServerShutsDownUnderIt) {
  NcclClient client(NewChannel(target()), "client");
  NcclFetch fetch(channel(), &client, FetchRequest(handle_));
  for (int i = 0; i < 2; ++i) ASSERT_NE(fetch.ReadOne(), nullptr);
  EXPECT_TRUE(Release(channel(), handle_).ok());
  server().Shutdown();
  EXPECT_EQ(fetch.Finish().status.error_code(), kUnavailable);
}

}  // namespace
}  // namespace structkv::testkit
