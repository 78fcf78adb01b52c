// Two workers in one process, over the fake NCCL.
#include "service/transport/nccl/worker.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/fake_nccl/fake_nccl.h"
#include "tests/testing/process.h"
#include "tests/transport/nccl/pair_kit.h"

namespace structkv::nccl::testing {
namespace {

using ::structkv::testkit::Eventually;
using ::testing::HasSubstr;

constexpr int64_t kMiB = int64_t{1} << 20;

std::vector<int64_t> Sizes(const std::vector<std::vector<Piece>>& groups) {
  std::vector<int64_t> sizes;
  for (const std::vector<Piece>& group : groups) {
    for (const Piece& piece : group) sizes.push_back(piece.bytes);
    sizes.push_back(-1);
  }
  return sizes;
}

TEST(PlanGroupsTest, CutsAtTheLimitAndLeavesOutWhatIsEmpty) {
  std::vector<std::byte> memory(20);
  std::byte* const data = memory.data();
  EXPECT_TRUE(PlanGroups({}, 8).empty());
  EXPECT_TRUE(PlanGroups({{nullptr, 0}}, 8).empty());
  EXPECT_THAT(Sizes(PlanGroups({{data, 5}, {nullptr, 0}, {data + 5, 3}, {data + 8, 1}}, 8)),
              ::testing::ElementsAre(5, 3, -1, 1, -1));
  const auto groups = PlanGroups({{data, 20}}, 8);
  EXPECT_THAT(Sizes(groups), ::testing::ElementsAre(8, -1, 8, -1, 4, -1));
  EXPECT_EQ(groups[2][0].data, data + 16);
}

TEST(PlanGroupsTest, BoundsThePiecesOfAGroup) {
  std::byte byte{};
  const std::vector<Buffer> buffers(kMaxGroupPieces + 1, Buffer{&byte, 1});
  const auto groups = PlanGroups(buffers, int64_t{1} << 30);
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_EQ(groups[0].size(), kMaxGroupPieces);
}

class WorkerTest : public ::testing::Test {
 protected:
  WorkerTest() { FaultNext(""); }
  ~WorkerTest() override {
    EXPECT_TRUE(Eventually([this] { return Held::Now() == before_; }))
        << ::testing::PrintToString(Held::Now()) << "; before "
        << ::testing::PrintToString(before_);
  }

  const Held before_ = Held::Now();
};

TEST_F(WorkerTest, RefusesOptionsOutOfRange) {
  WorkerOptions options = QuickOptions();
  options.max_communicators = 0;
  const auto worker = Worker::Start(FakeApi(), FakeDeviceApi(), options);
  EXPECT_EQ(worker.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(worker.status().message(), "max_communicators is 0, at least 1");
  options = QuickOptions();
  options.group_limit = absl::ZeroDuration();
  EXPECT_THAT(std::string(Worker::Start(FakeApi(), FakeDeviceApi(), options).status().message()),
              HasSubstr("group_limit is 0"));
  options = QuickOptions();
  options.device = 2;
  EXPECT_THAT(std::string(Worker::Start(FakeApi(), FakeDeviceApi(), options).status().message()),
              HasSubstr("devices 0 and 1"));
}

TEST_F(WorkerTest, MovesGroupedBuffersBothWays) {
  auto a = StartWorker();
  auto b = StartWorker();
  ConnectPair(a.get(), b.get(), 1);
  // 72 MiB in buffers that are cut, packed together, and empty.
  const std::vector<int64_t> lengths = {40 * kMiB, 0, 1, 8 * kMiB + 3, 15 * kMiB - 4, 9 * kMiB};
  Data there(lengths, 1);
  Data arrived(lengths, 0);
  Data back({kMiB}, 2);
  Data returned({kMiB}, 0);
  Outcome outcomes[4];
  a->Submit(1, MakeTransfer(Direction::kSend, &there, outcomes[0].Setter()));
  a->Submit(1, MakeTransfer(Direction::kReceive, &returned, outcomes[1].Setter()));
  b->Submit(1, MakeTransfer(Direction::kReceive, &arrived, outcomes[2].Setter()));
  b->Submit(1, MakeTransfer(Direction::kSend, &back, outcomes[3].Setter()));
  for (const Outcome& outcome : outcomes) EXPECT_EQ(outcome.Wait(), absl::OkStatus());
  EXPECT_TRUE(arrived == there);
  EXPECT_TRUE(returned == back);
  EXPECT_EQ(a->stats(), (WorkerStats{1, 0}));
  Outcome closed[2];
  a->Close(1, closed[0].Setter());
  b->Close(1, closed[1].Setter());
  EXPECT_EQ(closed[0].Wait(), absl::OkStatus());
  EXPECT_EQ(closed[1].Wait(), absl::OkStatus());
  EXPECT_TRUE(Eventually([&] { return a->stats() == WorkerStats{}; }));
}

TEST_F(WorkerTest, KeepsManyPairsApartAndTransfersInOrder) {
  constexpr int kPairs = 6;
  constexpr int kTransfers = 12;
  auto a = StartWorker();
  auto b = StartWorker();
  for (PeerId peer = 0; peer < kPairs; ++peer) ConnectPair(a.get(), b.get(), peer);
  std::vector<std::unique_ptr<Data>> sent;
  std::vector<std::unique_ptr<Data>> received;
  std::vector<Outcome> outcomes;
  std::vector<int> order[kPairs];  // as a's thread saw it
  for (int i = 0; i < kTransfers; ++i) {
    for (PeerId peer = 0; peer < kPairs; ++peer) {
      const std::vector<int64_t> lengths(1 + i % 3, 10000 + 1000 * i);
      sent.push_back(std::make_unique<Data>(lengths, 1 + sent.size()));
      received.push_back(std::make_unique<Data>(lengths, 0));
      const bool out = (i + peer) % 2 == 0;
      outcomes.emplace_back();
      a->Submit(peer, MakeTransfer(out ? Direction::kSend : Direction::kReceive,
                                   (out ? sent : received).back().get(),
                                   [&order, peer, i, set = outcomes.back().Setter()](
                                       const absl::Status& status) mutable {
                                     order[peer].push_back(i);
                                     set(status);
                                   }));
      outcomes.emplace_back();
      b->Submit(peer, MakeTransfer(out ? Direction::kReceive : Direction::kSend,
                                   (out ? received : sent).back().get(), outcomes.back().Setter()));
    }
  }
  for (const Outcome& outcome : outcomes) ASSERT_EQ(outcome.Wait(), absl::OkStatus());
  for (size_t i = 0; i < sent.size(); ++i) EXPECT_TRUE(*sent[i] == *received[i]) << i;
  for (const std::vector<int>& one : order) {
    EXPECT_EQ(one.size(), static_cast<size_t>(kTransfers));
    EXPECT_TRUE(std::is_sorted(one.begin(), one.end()));
  }
}

TEST_F(WorkerTest, RefusesMoreThanItsCommunicators) {
  WorkerOptions options = QuickOptions();
  options.max_communicators = 1;
  auto a = StartWorker(options);
  auto b = StartWorker();
  ConnectPair(a.get(), b.get(), 1);
  Outcome second;
  a->Connect(2, MakeId(b.get()), 0, {second.Setter(), {}, {}});
  EXPECT_EQ(second.Wait().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(second.Wait().message()), HasSubstr("all 1 NCCL communicators"));
  Outcome again;
  b->Connect(1, MakeId(b.get()), 0, {again.Setter(), {}, {}});
  EXPECT_EQ(again.Wait().code(), absl::StatusCode::kAlreadyExists);
  Outcome unknown;
  Data data({1}, 1);
  a->Submit(5, MakeTransfer(Direction::kSend, &data, unknown.Setter()));
  EXPECT_EQ(unknown.Wait().code(), absl::StatusCode::kUnavailable);
}

TEST_F(WorkerTest, EndsWhatIsUnderWayWhenItGoes) {
  auto b = StartWorker();
  Outcome waiting;
  Outcome connecting;
  Data data({kMiB}, 1);
  {
    auto a = StartWorker();
    ConnectPair(a.get(), b.get(), 1);
    a->Submit(1, MakeTransfer(Direction::kReceive, &data, waiting.Setter()));
    a->Connect(2, MakeId(b.get()), 0, {connecting.Setter(), {}, {}});
  }
  EXPECT_EQ(waiting.Wait().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(connecting.Wait().message()), HasSubstr("shuts down"));
}

}  // namespace
}  // namespace structkv::nccl::testing
