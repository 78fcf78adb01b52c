// Every fault, between processes, while another pair of the same worker goes on transferring.
#include <signal.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/fake_nccl/fake_nccl.h"
#include "tests/testing/process.h"
#include "tests/transport/nccl/pair_kit.h"

namespace structkv::nccl::testing {
namespace {

using ::structkv::testkit::Eventually;
using ::structkv::testkit::Process;
using ::testing::HasSubstr;

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr PeerId kGood = 1000;
const std::vector<int64_t> kLengths = {4 * kMiB, 1, 3 * kMiB - 1, 5 * kMiB};
const std::vector<int64_t> kLarge = {24 * kMiB, 1, 16 * kMiB - 1, 24 * kMiB};

// A pair that moves 3 MiB there and back, again and again, and compares every byte.
class Background {
 public:
  Background(Worker* a, Worker* b) : thread_([this, a, b] { Run(a, b); }) {}
  ~Background() {
    if (thread_.joinable()) Stop();
  }
  // How many round trips there were.
  int Stop() {
    stop_ = true;
    thread_.join();
    return rounds_;
  }
  int rounds() const { return rounds_; }

 private:
  void Run(Worker* a, Worker* b) {
    const std::vector<int64_t> lengths = {kMiB, 2 * kMiB};
    while (!stop_) {
      a->PeerAlive(kGood);
      Data out(lengths, 10 + rounds_);
      Data there(lengths, 0);
      Data back(lengths, 0);
      Outcome outcomes[4];
      a->Submit(kGood, MakeTransfer(Direction::kSend, &out, outcomes[0].Setter()));
      b->Submit(kGood, MakeTransfer(Direction::kReceive, &there, outcomes[1].Setter()));
      EXPECT_EQ(outcomes[1].Wait(), absl::OkStatus());
      b->Submit(kGood, MakeTransfer(Direction::kSend, &there, outcomes[2].Setter()));
      a->Submit(kGood, MakeTransfer(Direction::kReceive, &back, outcomes[3].Setter()));
      for (const Outcome& outcome : outcomes) EXPECT_EQ(outcome.Wait(), absl::OkStatus());
      EXPECT_TRUE(out == back);
      ++rounds_;
    }
  }

  std::atomic<bool> stop_ = false;
  std::atomic<int> rounds_ = 0;
  std::thread thread_;
};

// A worker with a good pair at work, and peers that are processes.
class NcclFaultTest : public ::testing::Test {
 protected:
  NcclFaultTest() {
    FaultNext("");
    LargestAbort();
  }

  void Start(WorkerOptions options = QuickOptions()) {
    worker_ = StartWorker(options);
    other_ = StartWorker();
    ConnectPair(worker_.get(), other_.get(), kGood);
    good_ = std::make_unique<Background>(worker_.get(), other_.get());
  }

  // The good pair has worked all the time, and does so after the fault.
  void TearDown() override {
    const int rounds = good_->rounds();
    EXPECT_TRUE(Eventually([&] { return good_->rounds() > rounds; }));
    EXPECT_GT(good_->Stop(), 0);
    Outcome closed[2];
    worker_->Close(kGood, closed[0].Setter());
    other_->Close(kGood, closed[1].Setter());
    for (const Outcome& outcome : closed) EXPECT_EQ(outcome.Wait(), absl::OkStatus());
    EXPECT_TRUE(Eventually([&] { return worker_->stats() == WorkerStats{}; }));
    peer_.reset();
    worker_.reset();
    other_.reset();
    EXPECT_TRUE(Eventually([this] { return Held::Now() == before_; }))
        << ::testing::PrintToString(Held::Now()) << "; before "
        << ::testing::PrintToString(before_);
  }

  // Starts the process; the outcome of our own end's Connect.
  Outcome ConnectPeer(PeerId peer, const std::string& fault, const std::string& direction,
                      const std::vector<int64_t>& lengths = kLengths) {
    const UniqueId id = MakeId(worker_.get());
    std::vector<std::string> command = {
        "/usr/bin/env", "FAKE_NCCL_FAULT=" + fault, NCCL_PEER, id.bytes, "1", direction, "7"};
    for (int64_t length : lengths) command.push_back(std::to_string(length));
    peer_ = std::make_unique<Process>(command);
    Outcome connected;
    worker_->Connect(peer, id, 0, Events(connected));
    return connected;
  }

  PeerEvents Events(const Outcome& connected) {
    return {connected.Setter(), [this](const absl::Status&) { ++lost_; }, [this] { ++gone_; }};
  }

  // A transfer whose buffers are kept by its `hold`.
  Outcome Submit(PeerId peer, Direction direction, std::shared_ptr<Data> data) {
    Outcome outcome;
    Transfer transfer = MakeTransfer(direction, data.get(), outcome.Setter());
    transfer.hold = std::move(data);
    worker_->Submit(peer, std::move(transfer));
    return outcome;
  }

  void ExpectLost(const Outcome& outcome, const std::string& text, absl::Duration limit) {
    const auto start = Clock::now();
    const absl::Status status = outcome.Wait();
    EXPECT_LT(Clock::now() - start, absl::ToChronoNanoseconds(limit));
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }

  const Held before_ = Held::Now();
  std::atomic<int> lost_ = 0;
  std::atomic<int> gone_ = 0;
  std::unique_ptr<Worker> worker_;
  std::unique_ptr<Worker> other_;
  std::unique_ptr<Background> good_;
  std::unique_ptr<Process> peer_;
};

TEST_F(NcclFaultTest, NoneMovesBetweenProcesses) {
  Start();
  EXPECT_EQ(ConnectPeer(1, "", "receive", kLarge).Wait(), absl::OkStatus());
  EXPECT_EQ(Submit(1, Direction::kSend, std::make_shared<Data>(kLarge, 7)).Wait(),
            absl::OkStatus());
  Outcome closed;
  worker_->Close(1, closed.Setter());
  EXPECT_EQ(closed.Wait(), absl::OkStatus());
  EXPECT_EQ(peer_->Wait(), 0) << peer_->output();
  EXPECT_EQ(ConnectPeer(2, "", "send", kLarge).Wait(), absl::OkStatus());
  const auto data = std::make_shared<Data>(kLarge, 0);
  EXPECT_EQ(Submit(2, Direction::kReceive, data).Wait(), absl::OkStatus());
  EXPECT_TRUE(*data == Data(kLarge, 7));
  Outcome closed_again;
  worker_->Close(2, closed_again.Setter());
  EXPECT_EQ(closed_again.Wait(), absl::OkStatus());
  EXPECT_EQ(lost_, 0);
}

TEST_F(NcclFaultTest, ThePeerNeverJoins) {
  Start(ImpatientOptions());
  const Outcome connected = ConnectPeer(1, "never_join", "receive");
  const Outcome early = Submit(1, Direction::kSend, std::make_shared<Data>(kLengths, 7));
  ExpectLost(connected, "NCCL pair 1: connecting took longer than 3s", absl::Seconds(15));
  ExpectLost(early, "connecting took longer", absl::Seconds(15));
  EXPECT_TRUE(Eventually([this] { return lost_ == 1 && gone_ == 1; }));
}

TEST_F(NcclFaultTest, ThePeerDiesInMidTransfer) {
  Start(ImpatientOptions());
  ASSERT_EQ(ConnectPeer(1, "die", "receive").Wait(), absl::OkStatus());
  const Outcome moved = Submit(1, Direction::kSend, std::make_shared<Data>(kLengths, 7));
  EXPECT_EQ(peer_->Wait(), 9);
  ExpectLost(moved, "a group of transfers took longer than 3s", absl::Seconds(15));
  ExpectLost(Submit(1, Direction::kSend, std::make_shared<Data>(kLengths, 7)), "pair 1 is closed",
             absl::Seconds(15));
}

TEST_F(NcclFaultTest, ThePeerStopsAndIsSilent) {
  WorkerOptions options = QuickOptions();
  options.silence_limit = absl::Seconds(3);
  Start(options);
  ASSERT_EQ(ConnectPeer(1, "hang", "receive").Wait(), absl::OkStatus());
  const Outcome moved = Submit(1, Direction::kSend, std::make_shared<Data>(kLengths, 7));
  peer_->Signal(SIGSTOP);
  ExpectLost(moved, "the peer was silent for longer than 3s", absl::Seconds(15));
}

TEST_F(NcclFaultTest, NcclReportsAnAsynchronousError) {
  Start();
  FaultNext("async_error");
  ASSERT_EQ(ConnectPeer(1, "", "send").Wait(), absl::OkStatus());
  ExpectLost(Submit(1, Direction::kReceive, std::make_shared<Data>(kLengths, 0)),
             "NCCL pair 1: transferring: remote process exited", absl::Seconds(15));
}

TEST_F(NcclFaultTest, TheEndsDisagreeAboutTheLengths) {
  Start();
  ASSERT_EQ(ConnectPeer(1, "", "send").Wait(), absl::OkStatus());
  ExpectLost(
      Submit(1, Direction::kReceive, std::make_shared<Data>(std::vector<int64_t>{kMiB, kMiB}, 0)),
      "invalid usage", absl::Seconds(15));
}

TEST_F(NcclFaultTest, AnAbortThatTakesLongHoldsUpNobody) {
  Start(ImpatientOptions());
  FaultNext("slow_abort");
  ASSERT_EQ(ConnectPeer(1, "", "send").Wait(), absl::OkStatus());
  auto data = std::make_shared<Data>(kLengths, 0);
  const std::weak_ptr<Data> held = data;
  const Outcome moved = Submit(1, Direction::kReceive, std::move(data));
  ExpectLost(moved, "a group of transfers took longer than 3s", absl::Seconds(15));
  // The caller knows; the memory stays until NCCL has let go of it.
  EXPECT_FALSE(held.expired());
  EXPECT_EQ(worker_->stats(), (WorkerStats{1, 1}));
  EXPECT_EQ(gone_, 0);
  const int rounds = good_->rounds();
  EXPECT_TRUE(Eventually([&] { return good_->rounds() > rounds + 1; }));
  EXPECT_EQ(ConnectPeer(2, "", "receive").Wait(), absl::OkStatus());
  EXPECT_EQ(Submit(2, Direction::kSend, std::make_shared<Data>(kLengths, 7)).Wait(),
            absl::OkStatus());
  EXPECT_FALSE(held.expired());
  EXPECT_TRUE(Eventually([&] { return held.expired() && gone_ == 1; }));
  Outcome closed;
  worker_->Close(2, closed.Setter());
  EXPECT_EQ(closed.Wait(), absl::OkStatus());
}

TEST_F(NcclFaultTest, AbortsWhatFailsTogetherAsOneGroup) {
  Start();
  Outcome never[3];
  std::vector<UniqueId> ids;
  for (int i = 0; i < 3; ++i) ids.push_back(MakeId(worker_.get()));
  // One job, and so one round of the worker's.
  Outcome all;
  worker_->MakeId([&, set = all.Setter()](const absl::StatusOr<UniqueId>& id) mutable {
    for (int i = 0; i < 3; ++i) worker_->Connect(i, ids[i], 0, Events(never[i]));
    for (int i = 0; i < 3; ++i) worker_->Abort(i, absl::CancelledError("not wanted"));
    set(id.status());
  });
  EXPECT_EQ(all.Wait(), absl::OkStatus());
  for (const Outcome& outcome : never) ExpectLost(outcome, "not wanted", absl::Seconds(15));
  EXPECT_TRUE(Eventually([this] { return gone_ == 3; }));
  EXPECT_EQ(LargestAbort(), 3);
  EXPECT_EQ(worker_->aborts(), 3);
}

}  // namespace
}  // namespace structkv::nccl::testing
