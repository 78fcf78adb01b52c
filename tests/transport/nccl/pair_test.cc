// The service's hub and its clients in one process, over the fake NCCL: attaching, the order, the
// cache of communicators, and faults with other pairs at work.
#include <algorithm>
#include <atomic>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/transport/nccl/client_pair.h"
#include "service/transport/nccl/hub.h"
#include "tests/testing/fake_nccl/fake_nccl.h"
#include "tests/testing/process.h"
#include "tests/transport/nccl/control_link.h"
#include "tests/transport/nccl/pair_kit.h"

namespace structkv::nccl::testing {
namespace {

using ::structkv::testkit::Eventually;
using ::testing::HasSubstr;

constexpr int64_t kMiB = int64_t{1} << 20;

Identity ClientIdentity(int client, const WorkerOptions& options = QuickOptions()) {
  return {kProtocolVersion, 22809, "client-" + std::to_string(client), "0000:01:00.0",
          options.group_bytes};
}

// A client with a GPU, and so a worker, of its own.
struct Client {
  Client(Hub* hub, int number, const WorkerOptions& options = QuickOptions())
      : worker(StartWorker(options)),
        link(std::make_unique<ControlLink>(hub, worker.get(), ClientIdentity(number, options))) {}
  ~Client() {
    link.reset();
    worker.reset();
  }
  Hub::PairId pair() const { return link->pair(); }

  std::unique_ptr<Worker> worker;
  std::unique_ptr<ControlLink> link;
};

// One transfer at both ends.
struct Exchange {
  Exchange(Hub* hub, const Client& client, const std::string& key, Direction service,
           std::vector<int64_t> lengths, uint64_t seed)
      : sent(std::make_shared<Data>(lengths, seed)), received(std::make_shared<Data>(lengths, 0)) {
    const bool out = service == Direction::kSend;
    hub->Submit(client.pair(), key, Make(service, out ? sent : received, at_service));
    client.link->client()->Offer(
        key, Make(out ? Direction::kReceive : Direction::kSend, out ? received : sent, at_client));
  }
  static Transfer Make(Direction direction, std::shared_ptr<Data> data, const Outcome& outcome) {
    Transfer transfer = MakeTransfer(direction, data.get(), outcome.Setter());
    transfer.hold = std::move(data);
    return transfer;
  }
  void ExpectDone() const {
    EXPECT_EQ(at_service.Wait(), absl::OkStatus());
    EXPECT_EQ(at_client.Wait(), absl::OkStatus());
    EXPECT_TRUE(*sent == *received);
  }
  void ExpectLost(const std::string& at_service_text, const std::string& at_client_text) const {
    EXPECT_EQ(at_service.Wait().code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(at_service.Wait().message()), HasSubstr(at_service_text));
    EXPECT_EQ(at_client.Wait().code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(at_client.Wait().message()), HasSubstr(at_client_text));
  }

  std::shared_ptr<Data> sent;
  std::shared_ptr<Data> received;
  Outcome at_service;
  Outcome at_client;
};

class NcclPairTest : public ::testing::Test {
 protected:
  NcclPairTest() { FaultNext(""); }

  void Start(WorkerOptions options = QuickOptions()) {
    hub_ = *Hub::Start(FakeApi(), FakeDeviceApi(), {options, "service"});
  }

  Client& NewClient(const WorkerOptions& options = QuickOptions()) {
    clients_.push_back(
        std::make_unique<Client>(hub_.get(), static_cast<int>(clients_.size()), options));
    EXPECT_TRUE(clients_.back()->link->WaitAttached().ok());
    return *clients_.back();
  }

  // A pair that is at work all the time; every byte is compared.
  void StartGood() {
    Client& client = NewClient();
    good_ = std::thread([this, &client] {
      while (!stop_) {
        const std::string key = "good" + std::to_string(rounds_);
        const Direction direction = rounds_ % 2 == 0 ? Direction::kSend : Direction::kReceive;
        Exchange(hub_.get(), client, key, direction, {kMiB, 1, kMiB}, 5 + rounds_).ExpectDone();
        ++rounds_;
      }
    });
  }

  void TearDown() override {
    if (good_.joinable()) {
      const int rounds = rounds_;
      EXPECT_TRUE(Eventually([&] { return rounds_ > rounds + 1; }));
      stop_ = true;
      good_.join();
    }
    clients_.clear();
    hub_.reset();
    EXPECT_TRUE(Eventually([this] { return Held::Now() == before_; }))
        << ::testing::PrintToString(Held::Now()) << "; before "
        << ::testing::PrintToString(before_);
  }

  const Held before_ = Held::Now();
  std::unique_ptr<Hub> hub_;
  std::vector<std::unique_ptr<Client>> clients_;
  std::atomic<bool> stop_ = false;
  std::atomic<int> rounds_ = 0;
  std::thread good_;
};

TEST_F(NcclPairTest, MovesLargeBuffersBothWays) {
  Start();
  Client& client = NewClient();
  EXPECT_EQ(*client.link->WaitAttached(), client.pair());
  EXPECT_EQ(hub_->stats().communicators, (WorkerStats{0, 0}));  // nothing to transfer yet
  const std::vector<int64_t> lengths = {40 * kMiB, 0, 3, 24 * kMiB - 3};
  Exchange(hub_.get(), client, "there", Direction::kSend, lengths, 1).ExpectDone();
  Exchange(hub_.get(), client, "back", Direction::kReceive, lengths, 2).ExpectDone();
  Exchange(hub_.get(), client, "nothing", Direction::kReceive, {}, 3).ExpectDone();
  EXPECT_EQ(hub_->stats().communicators, (WorkerStats{1, 0}));
}

TEST_F(NcclPairTest, RefusesOptionsAndClientsThatDoNotFit) {
  WorkerOptions options = QuickOptions();
  options.silence_limit = options.tick_interval;
  EXPECT_THAT(
      std::string(Hub::Start(FakeApi(), FakeDeviceApi(), {options, "x"}).status().message()),
      HasSubstr("tick_interval is 20ms, at most half of the silence_limit of 20ms"));
  Start();
  auto worker = StartWorker();
  Identity old = ClientIdentity(1);
  old.nccl_version = 22703;
  ControlLink link(hub_.get(), worker.get(), old);
  EXPECT_EQ(link.WaitAttached().status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(link.WaitAttached().status().message()),
              HasSubstr("nccl_version is 2.27.3, the other end has 2.28.9"));
  EXPECT_EQ(link.WaitEnded().code(), absl::StatusCode::kFailedPrecondition);
  auto impatient_worker = StartWorker(options);
  ControlLink impatient(hub_.get(), impatient_worker.get(), ClientIdentity(2));
  EXPECT_THAT(std::string(impatient.WaitAttached().status().message()),
              HasSubstr("heartbeat_interval is 20ms"));
  EXPECT_TRUE(Eventually([this] { return hub_->stats().pairs == 0; }));
}

// Both ends become ready in orders of their own, from several threads.
TEST_F(NcclPairTest, BothEndsFollowOneOrder) {
  constexpr int kClients = 3;
  constexpr int kTransfers = 40;
  Start();
  for (int i = 0; i < kClients; ++i) NewClient();
  struct Side {
    std::vector<std::unique_ptr<Data>> data;
    std::vector<Outcome> outcomes{kTransfers};
    std::vector<int> order;
  };
  std::vector<Side> services(kClients);
  std::vector<Side> ends(kClients);
  std::vector<std::thread> threads;
  const auto run = [&](int client, bool service) {
    Side& side = (service ? services : ends)[client];
    std::vector<int> mixed(kTransfers);
    for (int i = 0; i < kTransfers; ++i) mixed[i] = i;
    std::shuffle(mixed.begin(), mixed.end(), std::mt19937(2 * client + service));
    for (int i : mixed) {
      const bool send = (i % 2 == 0) == service;
      Transfer transfer = MakeTransfer(
          send ? Direction::kSend : Direction::kReceive, side.data[i].get(),
          [&side, i, set = side.outcomes[i].Setter()](const absl::Status& status) mutable {
            side.order.push_back(i);
            set(status);
          });
      const std::string key = std::to_string(i);
      if (service) {
        hub_->Submit(clients_[client]->pair(), key, std::move(transfer));
      } else {
        clients_[client]->link->client()->Offer(key, std::move(transfer));
      }
    }
  };
  for (int client = 0; client < kClients; ++client) {
    for (int i = 0; i < kTransfers; ++i) {
      const std::vector<int64_t> lengths = {5000 + i, 70000};
      const uint64_t seed = 1 + client * kTransfers + i;
      services[client].data.push_back(std::make_unique<Data>(lengths, i % 2 == 0 ? seed : 0));
      ends[client].data.push_back(std::make_unique<Data>(lengths, i % 2 == 0 ? 0 : seed));
    }
  }
  for (int client = 0; client < kClients; ++client) {
    threads.emplace_back(run, client, true);
    threads.emplace_back(run, client, false);
  }
  for (std::thread& thread : threads) thread.join();
  for (int client = 0; client < kClients; ++client) {
    for (int i = 0; i < kTransfers; ++i) {
      ASSERT_EQ(services[client].outcomes[i].Wait(), absl::OkStatus());
      ASSERT_EQ(ends[client].outcomes[i].Wait(), absl::OkStatus());
      EXPECT_TRUE(*services[client].data[i] == *ends[client].data[i]);
    }
    EXPECT_EQ(services[client].order, ends[client].order);
  }
}

TEST_F(NcclPairTest, MorePairsThanCommunicators) {
  WorkerOptions options = QuickOptions();
  options.max_communicators = 2;
  Start(options);
  for (int i = 0; i < 5; ++i) NewClient();
  std::atomic<bool> done = false;
  std::atomic<int> most = 0;
  std::thread watch([&] {
    while (!done) {
      const WorkerStats stats = hub_->stats().communicators;
      most = std::max(most.load(), stats.live + stats.reclaiming);
    }
  });
  std::vector<std::unique_ptr<Exchange>> exchanges;
  for (int round = 0; round < 4; ++round) {
    for (const auto& client : clients_) {
      exchanges.push_back(
          std::make_unique<Exchange>(hub_.get(), *client, std::to_string(round),
                                     round % 2 == 0 ? Direction::kSend : Direction::kReceive,
                                     std::vector<int64_t>{kMiB, 77}, exchanges.size() + 1));
    }
    if (round == 1) {
      for (const auto& exchange : exchanges) exchange->ExpectDone();
    }
  }
  for (const auto& exchange : exchanges) exchange->ExpectDone();
  done = true;
  watch.join();
  EXPECT_EQ(most, 2);
  EXPECT_EQ(hub_->stats().pairs, 5);
}

TEST_F(NcclPairTest, WhatDoesNotFitIsRefusedAndThePairGoesOn) {
  Start();
  Client& client = NewClient();
  Data data({10}, 1);
  Data other({11}, 1);
  Outcome own;
  Outcome offered;
  hub_->Submit(client.pair(), "k", MakeTransfer(Direction::kSend, &data, own.Setter()));
  client.link->client()->Offer("k", MakeTransfer(Direction::kReceive, &other, offered.Setter()));
  const absl::Status why =
      absl::InvalidArgumentError("transfer 'k': buffer 0 has 11 bytes, 10 are needed");
  EXPECT_EQ(own.Wait(), why);
  EXPECT_EQ(offered.Wait(), why);
  Outcome twice[2];
  hub_->Submit(client.pair(), "t", MakeTransfer(Direction::kSend, &data, twice[0].Setter()));
  hub_->Submit(client.pair(), "t", MakeTransfer(Direction::kSend, &data, twice[1].Setter()));
  EXPECT_EQ(twice[1].Wait().code(), absl::StatusCode::kAlreadyExists);
  hub_->Cancel(client.pair(), nullptr);
  EXPECT_EQ(twice[0].Wait().code(), absl::StatusCode::kCancelled);
  Outcome unnamed;
  client.link->client()->Offer("", MakeTransfer(Direction::kReceive, &data, unnamed.Setter()));
  EXPECT_EQ(unnamed.Wait().code(), absl::StatusCode::kInvalidArgument);
  Exchange(hub_.get(), client, "k", Direction::kSend, {kMiB}, 1).ExpectDone();
  Outcome nobody;
  hub_->Submit(client.pair() + 1, "k", MakeTransfer(Direction::kSend, &data, nobody.Setter()));
  EXPECT_EQ(nobody.Wait().code(), absl::StatusCode::kUnavailable);
}

TEST_F(NcclPairTest, WhoCancelsTakesBackHisOwnAlone) {
  Start();
  Client& client = NewClient();
  Data data({10}, 1);
  Data room({10}, 0);
  const int owners[2] = {};
  const auto submit = [&](int owner, const char* key, const Outcome& outcome) {
    Transfer transfer = MakeTransfer(Direction::kSend, &data, outcome.Setter());
    transfer.owner = &owners[owner];
    hub_->Submit(client.pair(), key, std::move(transfer));
  };
  Outcome first;
  Outcome same_key;
  Outcome other_key;
  submit(0, "k", first);
  submit(1, "k", same_key);
  submit(1, "l", other_key);
  EXPECT_EQ(same_key.Wait().code(), absl::StatusCode::kAlreadyExists);
  hub_->Cancel(client.pair(), &owners[1]);
  EXPECT_EQ(other_key.Wait(), absl::CancelledError("transfer 'l' was cancelled"));
  Outcome offered;
  client.link->client()->Offer("k", MakeTransfer(Direction::kReceive, &room, offered.Setter()));
  EXPECT_EQ(first.Wait(), absl::OkStatus());
  EXPECT_EQ(offered.Wait(), absl::OkStatus());
}

TEST_F(NcclPairTest, AnOfferIsTakenBack) {
  Start();
  Client& client = NewClient();
  Data data({10}, 1);
  Outcome withdrawn;
  client.link->client()->Offer("k", MakeTransfer(Direction::kReceive, &data, withdrawn.Setter()));
  client.link->client()->Withdraw("k");
  EXPECT_EQ(withdrawn.Wait(), absl::CancelledError("transfer 'k' was withdrawn"));
  client.link->client()->Withdraw("k");
  Exchange(hub_.get(), client, "k", Direction::kSend, {kMiB}, 1).ExpectDone();
  client.link->client()->Withdraw("k");
  Exchange(hub_.get(), client, "k", Direction::kReceive, {kMiB}, 2).ExpectDone();
}

TEST_F(NcclPairTest, AnOfferIsNotWaitedForForever) {
  HubOptions options{QuickOptions(), "service"};
  options.worker.tick_interval = absl::Milliseconds(20);
  options.offer_limit = absl::Milliseconds(100);
  hub_ = *Hub::Start(FakeApi(), FakeDeviceApi(), options);
  Client& client = NewClient();
  Data data({10}, 1);
  Outcome own;
  hub_->Submit(client.pair(), "k", MakeTransfer(Direction::kSend, &data, own.Setter()));
  EXPECT_EQ(own.Wait(), absl::DeadlineExceededError(
                            "transfer 'k': the client did not offer it within the limit of 100ms"));
  Exchange(hub_.get(), client, "k", Direction::kSend, {kMiB}, 1).ExpectDone();
}

// All communicators are others': what waits for one can be cancelled, and does not wait for ever.
TEST_F(NcclPairTest, WhatWaitsForACommunicatorCanBeTakenBack) {
  HubOptions options{QuickOptions(), "service"};
  options.worker.max_communicators = 1;
  options.offer_limit = absl::Seconds(1);
  hub_ = *Hub::Start(FakeApi(), FakeDeviceApi(), options);
  Client& busy = NewClient();
  FaultNext("hang");
  const Exchange hangs(hub_.get(), busy, "k", Direction::kSend, {8 * kMiB}, 1);
  EXPECT_TRUE(Eventually([this] { return hub_->stats().communicators.live == 1; }));
  Client& waits = NewClient();
  const Exchange cancelled(hub_.get(), waits, "cancelled", Direction::kSend, {kMiB}, 1);
  hub_->Cancel(waits.pair(), nullptr);
  EXPECT_EQ(cancelled.at_service.Wait(),
            absl::CancelledError("transfer 'cancelled' was cancelled"));
  const Exchange late(hub_.get(), waits, "late", Direction::kSend, {kMiB}, 1);
  EXPECT_EQ(late.at_service.Wait(),
            absl::DeadlineExceededError("transfer 'late': no communicator was free within the "
                                        "limit of 1s"));
  EXPECT_FALSE(late.at_client.is_set());
  busy.link->Break();
  Exchange(hub_.get(), waits, "next", Direction::kSend, {kMiB}, 1).ExpectDone();
  waits.link->Break();
  EXPECT_EQ(late.at_client.Wait().code(), absl::StatusCode::kUnavailable);
}

TEST_F(NcclPairTest, PairsAreLimited) {
  HubOptions options{QuickOptions(), "service"};
  options.worker.tick_interval = absl::Seconds(30);  // only Attach calls
  options.max_pairs = 3;
  options.max_pairs_of_tenant = 2;
  hub_ = *Hub::Start(FakeApi(), FakeDeviceApi(), options);
  const auto attach = [this](const std::string& tenant) {
    auto status = std::make_shared<absl::Status>();
    hub_->Attach(
        {[](const ServiceMessage&) {}, [status](const absl::Status& why) { *status = why; }},
        tenant);
    return *status;
  };
  EXPECT_EQ(attach("a"), absl::OkStatus());
  EXPECT_EQ(attach("a"), absl::OkStatus());
  EXPECT_EQ(attach("a"), absl::ResourceExhaustedError(
                             "2 NCCL pairs of the tenant are attached, at most 2 are allowed"));
  EXPECT_EQ(attach("b"), absl::OkStatus());
  EXPECT_EQ(attach("c"),
            absl::ResourceExhaustedError("3 NCCL pairs are attached, at most 3 are allowed"));
  EXPECT_EQ(hub_->stats().pairs, 3);
}

TEST_F(NcclPairTest, OnceItHasStoppedItCallsNobody) {
  Start();
  Client& client = NewClient();
  Data data({10}, 1);
  Data room({10}, 0);
  std::atomic<bool> returned = false;
  Outcome told;
  hub_->Submit(client.pair(), "k",
               MakeTransfer(Direction::kSend, &data, [&](const absl::Status& status) {
                 told.Setter()(status);
                 std::this_thread::sleep_for(std::chrono::milliseconds(200));
                 returned = true;
               }));
  Outcome offered;
  client.link->client()->Offer("k", MakeTransfer(Direction::kReceive, &room, offered.Setter()));
  EXPECT_EQ(told.Wait(), absl::OkStatus());
  hub_->Stop();
  EXPECT_TRUE(returned);
  Outcome after;
  hub_->Submit(client.pair(), "l", MakeTransfer(Direction::kSend, &data, after.Setter()));
  EXPECT_EQ(after.Wait().code(), absl::StatusCode::kUnavailable);
  hub_->Cancel(client.pair(), nullptr);
}

TEST_F(NcclPairTest, APairIsItsTenants) {
  Start();
  Client& client = NewClient();
  const auto life = hub_->Find(client.pair(), "");
  ASSERT_TRUE(life.ok());
  EXPECT_EQ((*life)->status(), absl::OkStatus());
  EXPECT_EQ(hub_->Find(client.pair(), "another").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(hub_->Find(client.pair() + 1, "").status().code(), absl::StatusCode::kNotFound);
  const auto silent =
      hub_->Attach({[](const ServiceMessage&) {}, [](const absl::Status&) {}}, "tenant");
  EXPECT_EQ(hub_->Find(silent, "tenant").status().code(), absl::StatusCode::kNotFound);
  hub_->OnEnd(silent, absl::CancelledError("gone"));
  client.link->client()->End();
  (void)client.link->WaitEnded();
  EXPECT_EQ((*life)->status(),
            absl::UnavailableError("the client gave up: the client ended the pair"));
}

TEST_F(NcclPairTest, WhenNobodyAttachesAnyMoreOthersGoOn) {
  Start();
  Client& client = NewClient();
  hub_->StopAttaching(absl::UnavailableError("the server is draining"));
  absl::Status ended;
  hub_->Attach({[](const ServiceMessage&) {}, [&](const absl::Status& why) { ended = why; }});
  EXPECT_EQ(ended, absl::UnavailableError("the server is draining"));
  Exchange(hub_.get(), client, "k", Direction::kSend, {kMiB}, 1).ExpectDone();
}

TEST_F(NcclPairTest, BadMessagesEndThePair) {
  Start();
  StartGood();
  const auto expect = [&](Client& client, const char* text) {
    const absl::Status ended = client.link->WaitEnded();
    EXPECT_EQ(ended.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(ended.message()), HasSubstr(text));
  };
  Client& twice = NewClient();
  twice.link->SendAsClient(ClientIdentity(1));
  expect(twice, "hello came twice");
  Client& joins = NewClient();
  joins.link->SendAsClient(Join{1, {}});
  expect(joins, "join of generation 1 came, which was not asked for");
  Client& finished = NewClient();
  Exchange(hub_.get(), finished, "k", Direction::kSend, {1}, 1).ExpectDone();
  finished.link->SendAsClient(Finished{9});
  expect(finished, "finished of sequence 9 came");
  // And what the client takes from no service.
  Client& ordered = NewClient();
  Data data({1}, 1);
  Outcome waiting;
  ordered.link->client()->Offer("k", MakeTransfer(Direction::kSend, &data, waiting.Setter()));
  ordered.link->client()->OnMessage(Order{0, 2, "k"});
  EXPECT_THAT(
      std::string(waiting.Wait().message()),
      HasSubstr("the service ordered transfer 'k' of generation 0 as 2; generation 0 and 1"));
  const absl::Status ended = ordered.link->WaitEnded();
  EXPECT_EQ(ended.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(ended.message()), HasSubstr("the client gave up: the service ordered"));
}

TEST_F(NcclPairTest, AClientThatDoesNotSayHello) {
  Start(ImpatientOptions());
  StartGood();
  absl::Status status;
  std::atomic<bool> ended = false;
  hub_->Attach({[](const ServiceMessage&) {},
                [&](const absl::Status& why) {
                  status = why;
                  ended = true;
                }});
  EXPECT_TRUE(Eventually([&] { return ended.load(); }));
  EXPECT_EQ(status, absl::UnavailableError("the client was silent for longer than 3s"));
  EXPECT_EQ(hub_->stats().pairs, 1);
}

TEST_F(NcclPairTest, AClientThatDoesNotJoin) {
  Start(ImpatientOptions());
  StartGood();
  Client& client = NewClient();
  Data data({kMiB}, 1);
  Outcome offered;
  Outcome own;
  client.link->client()->Offer("k", MakeTransfer(Direction::kReceive, &data, offered.Setter()));
  EXPECT_FALSE(Eventually([&] { return offered.is_set(); }, std::chrono::milliseconds(50)));
  client.link->Cut();
  hub_->Submit(client.pair(), "k", MakeTransfer(Direction::kSend, &data, own.Setter()));
  EXPECT_EQ(own.Wait(), absl::UnavailableError("the client was silent for longer than 3s"));
  client.link->Break();
  EXPECT_EQ(offered.Wait().code(), absl::StatusCode::kUnavailable);
}

// Its heartbeats come, so that it would keep its communicator for ever.
TEST_F(NcclPairTest, AClientThatDoesNotSayThatItHasFinished) {
  WorkerOptions options = ImpatientOptions();
  options.max_communicators = 1;
  Start(options);
  Client& client = NewClient();
  client.link->DropFinished();
  Exchange(hub_.get(), client, "k", Direction::kSend, {kMiB}, 1).ExpectDone();
  Client& next = NewClient();
  Exchange(hub_.get(), next, "k", Direction::kSend, {kMiB}, 1).ExpectDone();
  EXPECT_EQ(client.link->WaitEnded(),
            absl::UnavailableError(
                "the client was silent about the end of transfer 1 for longer than 3s"));
}

TEST_F(NcclPairTest, ACommunicatorThatIsNeverJoined) {
  Start(ImpatientOptions());
  StartGood();
  Client& client = NewClient();
  EXPECT_TRUE(Eventually([this] { return rounds_ > 0; }));
  FaultNext("never_join@0");
  Exchange(hub_.get(), client, "k", Direction::kSend, {kMiB}, 1)
      .ExpectLost("connecting took longer than 3s", "");
}

// A transfer that waits for a communicator which is on its way has the limit of connecting.
TEST_F(NcclPairTest, AConnectThatTakesLongerThanOffersMay) {
  HubOptions options{ImpatientOptions(), "service"};
  options.offer_limit = absl::Seconds(1);
  hub_ = *Hub::Start(FakeApi(), FakeDeviceApi(), options);
  FaultNext("never_join@0");
  Exchange(hub_.get(), NewClient(), "k", Direction::kSend, {kMiB}, 1)
      .ExpectLost("connecting took longer than 3s", "");
}

TEST_F(NcclPairTest, AnAsynchronousErrorEndsThePairAtBothEnds) {
  Start();
  StartGood();
  EXPECT_TRUE(Eventually([this] { return rounds_ > 0; }));
  Client& client = NewClient();
  Exchange(hub_.get(), client, "first", Direction::kSend, {kMiB}, 1).ExpectDone();
  Client& failing = NewClient();
  FaultNext("async_error@0");
  const Exchange lost(hub_.get(), failing, "k", Direction::kSend, {8 * kMiB}, 1);
  lost.ExpectLost("remote process exited", "");
  EXPECT_EQ(failing.link->WaitEnded().code(), absl::StatusCode::kUnavailable);
  Exchange(hub_.get(), client, "last", Direction::kReceive, {kMiB}, 1).ExpectDone();
}

TEST_F(NcclPairTest, AStreamThatBreaksInMidTransfer) {
  Start();
  StartGood();
  EXPECT_TRUE(Eventually([this] { return rounds_ > 0; }));
  Client& client = NewClient();
  FaultNext("hang");
  const Exchange lost(hub_.get(), client, "k", Direction::kSend, {8 * kMiB}, 1);
  EXPECT_FALSE(
      Eventually([&] { return lost.at_service.is_set(); }, std::chrono::milliseconds(100)));
  client.link->Break();
  lost.ExpectLost("the control stream ended: connection reset",
                  "the control stream ended: connection reset");
}

TEST_F(NcclPairTest, APeerThatFallsSilentInMidTransfer) {
  WorkerOptions options = QuickOptions();
  options.silence_limit = absl::Seconds(2);
  Start(options);
  StartGood();
  EXPECT_TRUE(Eventually([this] { return rounds_ > 0; }));
  Client& client = NewClient(options);
  FaultNext("hang");
  const Exchange lost(hub_.get(), client, "k", Direction::kSend, {8 * kMiB}, 1);
  EXPECT_FALSE(
      Eventually([&] { return lost.at_service.is_set(); }, std::chrono::milliseconds(100)));
  client.link->Cut();
  // The GPU's thread and the hub both look; whichever does first.
  lost.ExpectLost(" was silent for longer than 2s", "the peer was silent for longer than 2s");
}

// With one place, the next pair waits until the slow abort has returned, and is then served.
TEST_F(NcclPairTest, ASlowAbortKeepsItsPlaceAlone) {
  WorkerOptions options = ImpatientOptions();
  options.max_communicators = 2;
  Start(options);
  StartGood();
  EXPECT_TRUE(Eventually([this] { return rounds_ > 0; }));
  Client& failing = NewClient();
  Client& next = NewClient();
  auto exchange = std::make_unique<Exchange>(hub_.get(), failing, "first", Direction::kSend,
                                             std::vector<int64_t>{kMiB}, 1);
  exchange->ExpectDone();
  failing.link->Break();
  Client& slow = NewClient();
  FaultNext("slow_abort@0");
  const Exchange lost(hub_.get(), slow, "k", Direction::kSend, {8 * kMiB}, 1);
  lost.ExpectLost("a group of transfers took longer than 3s", "");
  const Exchange waits(hub_.get(), next, "k", Direction::kReceive, {kMiB}, 3);
  const int rounds = rounds_;
  EXPECT_TRUE(Eventually([&] { return rounds_ > rounds + 1; }));
  EXPECT_FALSE(waits.at_service.is_set());
  EXPECT_EQ(hub_->stats().communicators, (WorkerStats{1, 1}));
  waits.ExpectDone();
}

TEST_F(NcclPairTest, TheServiceGoesInMidTransfer) {
  Start();
  Client& client = NewClient();
  FaultNext("hang");
  const Exchange lost(hub_.get(), client, "k", Direction::kSend, {8 * kMiB}, 1);
  EXPECT_TRUE(Eventually([this] { return hub_->stats().communicators.live == 1; }));
  Data data({1}, 1);
  Outcome waiting;
  hub_->Submit(client.pair(), "w", MakeTransfer(Direction::kSend, &data, waiting.Setter()));
  hub_->Attach({[](const ServiceMessage&) {}, [](const absl::Status&) {}});
  // The links of the fixture outlive the hub; nothing may reach it any more.
  client.link->Break();
  clients_.clear();
  hub_.reset();
  lost.ExpectLost("", "");
  EXPECT_EQ(waiting.Wait().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace structkv::nccl::testing
