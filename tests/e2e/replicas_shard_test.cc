// Ranks of one prompt and several servers: they meet without a word between them.
#include <csignal>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "structkv/compress.h"
#include "tests/e2e/client_prompt.h"
#include "tests/e2e/replicas_test.h"
#include "tests/testing/shards.h"

namespace structkv::testkit {
namespace {

using ::testing::HasSubstr;

constexpr int kRanks = 2;

// Ranks of one prompt, each with a client of its own that knows the replicas in its own order.
class ShardedReplicasTest : public ReplicasTest {
 protected:
  struct Rank {
    absl::StatusOr<client::Compressed> got;
    std::string replica;
  };

  ShardedReplicasTest() : whole_(SmallOpen(), 7) { parts_ = SplitByRanks(whole_, kRanks); }

  // One prompt of its own group, by all ranks at a time.
  std::vector<Rank> Run(const std::vector<std::unique_ptr<client::Client>>& clients,
                        const std::string& group, const std::string& replica = "") {
    std::vector<Rank> ranks(kRanks);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < kRanks; ++i) {
      threads.emplace_back([&, i] {
        const PromptData& part = parts_[i];
        v1::Open open = part.open();
        open.mutable_shard_group()->set_group_id(group);
        client::SessionOptions options;
        options.timeout = absl::Seconds(60);
        options.replica = replica;
        ranks[i].got = client::CompressPrompt(
            *clients[i], open,
            [&](uint32_t layer) {
              absl::SleepFor(absl::Milliseconds(1));
              return absl::StatusOr<client::LayerTensors>(TensorsOf(part, layer));
            },
            options);
      });
    }
    for (std::thread& thread : threads) thread.join();
    return ranks;
  }

  // What both ranks get of one server.
  std::vector<std::string> Expected() {
    std::vector<std::unique_ptr<client::Client>> clients;
    for (int i = 0; i < kRanks; ++i) clients.push_back(ConnectTo(server(0).address()));
    std::vector<std::string> texts;
    for (const Rank& rank : Run(clients, "expected")) {
      EXPECT_TRUE(rank.got.ok()) << rank.got.status();
      texts.push_back(rank.got.ok() ? Text(*rank.got) : "");
    }
    return texts;
  }

  std::vector<std::unique_ptr<client::Client>> ConnectRanks() {
    std::vector<std::unique_ptr<client::Client>> clients;
    const std::vector<std::string> addresses = *list_.Get();
    const std::vector<std::string> reversed(addresses.rbegin(), addresses.rend());
    clients.push_back(ConnectTo(absl::StrJoin(addresses, ",")));
    clients.push_back(ConnectTo(absl::StrJoin(reversed, ",")));
    return clients;
  }

  const PromptData whole_;
  std::vector<PromptData> parts_;
};

TEST_F(ShardedReplicasTest, RanksMeetAtOneReplicaEach) {
  StartAll(3, {"--shard-group-limit", "20s"});
  const std::vector<std::string> expected = Expected();
  const auto clients = ConnectRanks();
  const auto run = [&](int first, int count) {
    for (int i = first; i < first + count; ++i) {
      const std::vector<Rank> ranks = Run(clients, absl::StrCat("group ", i));
      for (size_t rank = 0; rank < kRanks; ++rank) {
        ASSERT_TRUE(ranks[rank].got.ok()) << ranks[rank].got.status();
        EXPECT_TRUE(Text(*ranks[rank].got) == expected[rank]);
      }
    }
  };
  run(0, 16);
  Kill(server(1));
  run(16, 16);
  for (const size_t survivor : {0, 2}) ExpectNothingHeld(server(survivor).address());
}

// Where a rank runs, and that a group goes where its ranks are told.
TEST_F(ShardedReplicasTest, RanksAreSpreadAndGoWhereTheyAreTold) {
  StartAll(3);
  const auto clients = ConnectRanks();
  std::map<std::string, int> counts;
  for (int i = 0; i < 30; ++i) {
    std::vector<std::string> replicas;
    std::vector<std::thread> threads;
    replicas.resize(kRanks);
    for (size_t rank = 0; rank < kRanks; ++rank) {
      threads.emplace_back([&, rank] {
        v1::Open open = parts_[rank].open();
        open.mutable_shard_group()->set_group_id(absl::StrCat("spread ", i));
        const auto session = clients[rank]->OpenPrompt(open);
        ASSERT_TRUE(session.ok()) << session.status();
        replicas[rank] = (*session)->replica();
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(replicas[0], replicas[1]);
    ++counts[replicas[0]];
  }
  EXPECT_EQ(counts.size(), 3U);
  const std::vector<std::string> expected = Expected();
  const auto chosen = clients[0]->ChooseReplica(whole_.open());
  ASSERT_TRUE(chosen.ok()) << chosen.status();
  for (size_t i = 0; i < 3; ++i) {
    const std::vector<Rank> ranks = Run(clients, absl::StrCat("told ", i), *chosen);
    for (size_t rank = 0; rank < kRanks; ++rank) {
      ASSERT_TRUE(ranks[rank].got.ok()) << ranks[rank].got.status();
      EXPECT_TRUE(Text(*ranks[rank].got) == expected[rank]);
    }
  }
}

// A server is killed under groups: each rank ends with the right answer or says what happened.
TEST_F(ShardedReplicasTest, GroupsEndWithTheirServer) {
  StartAll(3, {"--shard-group-limit", "5s"});
  const std::vector<std::string> expected = Expected();
  const auto clients = ConnectRanks();
  std::thread killer([&] {
    absl::SleepFor(absl::Milliseconds(150));
    Kill(server(1));
  });
  int good = 0;
  for (int i = 0; i < 40; ++i) {
    const std::vector<Rank> ranks = Run(clients, absl::StrCat("killed ", i));
    for (size_t rank = 0; rank < kRanks; ++rank) {
      const absl::Status& status = ranks[rank].got.status();
      if (status.ok()) {
        EXPECT_TRUE(Text(*ranks[rank].got) == expected[rank]);
        ++good;
        continue;
      }
      EXPECT_TRUE(absl::IsUnavailable(status) || absl::IsAborted(status) ||
                  absl::IsDeadlineExceeded(status))
          << status;
      EXPECT_THAT(status.message(), HasSubstr("127.0.0.1:"));
    }
  }
  killer.join();
  EXPECT_GE(good, 70);  // all but the groups that the server took with it
  for (const size_t survivor : {0, 2}) ExpectNothingHeld(server(survivor).address());
}

}  // namespace
}  // namespace structkv::testkit
