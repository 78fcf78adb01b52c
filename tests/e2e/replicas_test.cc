// One client and several servers, as processes of their own, that come and go while prompts run.
#include "tests/e2e/replicas_test.h"

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

namespace structkv::testkit {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<client::Compressed> Compress(client::Client& client, const PromptData& data,
                                            absl::Duration pause = absl::ZeroDuration()) {
  client::SessionOptions options;
  options.timeout = absl::Seconds(60);
  return client::CompressPrompt(
      client, data.open(),
      [&](uint32_t layer) {
        absl::SleepFor(pause);
        return absl::StatusOr<client::LayerTensors>(TensorsOf(data, layer));
      },
      options);
}

// The same by a session, that is never tried again once it is open; and where it ran.
absl::StatusOr<client::Compressed> CompressOnce(client::Client& client, const PromptData& data,
                                                std::string* replica, absl::Duration pause,
                                                const client::SessionOptions& options = {}) {
  auto session = client.OpenPrompt(data.open(), options);
  if (!session.ok()) return session.status();
  *replica = (*session)->replica();
  for (uint32_t layer = 0; layer < data.layers(); ++layer) {
    absl::SleepFor(pause);
    absl::Status status = (*session)->SendLayer(layer, TensorsOf(data, layer));
    if (!status.ok()) return status;
  }
  absl::Status status = (*session)->Commit();
  if (!status.ok()) return status;
  return (*session)->Collect();
}

// Workers that send prompts one after the other, and what became of them.
class Workers {
 public:
  Workers(client::Client* client, const std::vector<PromptData>* prompts,
          std::vector<std::string> expected)
      : client_(*client), prompts_(*prompts), expected_(std::move(expected)) {
    for (int i = 0; i < 4; ++i) threads_.emplace_back([this, i] { Run(i); });
  }
  ~Workers() { Stop(); }

  void Stop() {
    {
      absl::MutexLock lock(&mutex_);
      stopped_ = true;
    }
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  // Waits for `count` more prompts to end well.
  bool WaitForMore(int count) {
    const int want = good() + count;
    return Eventually([&] { return good() >= want; }, std::chrono::seconds(60));
  }
  int good() const {
    absl::MutexLock lock(&mutex_);
    return good_;
  }

  struct Failure {
    absl::Time started;
    absl::Status status;
  };
  // After Stop():
  std::vector<Failure> failures_;
  std::map<std::string, int> replicas_;  // prompts that ended well, of those that know it
  int wrong_ = 0;

 private:
  void Run(int worker) {
    for (int i = worker;; ++i) {
      {
        absl::MutexLock lock(&mutex_);
        if (stopped_) return;
      }
      const size_t which = static_cast<size_t>(i) % prompts_.size();
      const absl::Time started = absl::Now();
      std::string replica;
      const auto got =
          worker % 2 == 0 ? Compress(client_, prompts_[which], absl::Milliseconds(1))
                          : CompressOnce(client_, prompts_[which], &replica, absl::Milliseconds(1));
      absl::MutexLock lock(&mutex_);
      if (!got.ok()) {
        failures_.push_back({started, got.status()});
      } else if (Text(*got) != expected_[which]) {
        ++wrong_;
      } else {
        ++good_;
        if (!replica.empty()) ++replicas_[replica];
      }
    }
  }

  client::Client& client_;
  const std::vector<PromptData>& prompts_;
  const std::vector<std::string> expected_;
  mutable absl::Mutex mutex_;
  bool stopped_ = false;
  int good_ = 0;
  std::vector<std::thread> threads_;
};

// One is killed, one drains, one is new: no prompt gets a wrong answer, those that a killed server
// had end in its error, and no later one fails.
TEST_F(ReplicasTest, PromptsGoOnWhileServersComeAndGo) {
  StartAll(3);
  std::vector<PromptData> prompts;
  std::vector<std::string> expected;
  const auto alone = ConnectTo(server(2).address());
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    prompts.emplace_back(SmallOpen(200 + 50 * static_cast<uint32_t>(seed)), seed);
    const auto compressed = Compress(*alone, prompts.back());
    ASSERT_TRUE(compressed.ok()) << compressed.status();
    expected.push_back(Text(*compressed));
  }
  const auto client = Connect();
  Workers workers(client.get(), &prompts, expected);
  ASSERT_TRUE(workers.WaitForMore(40));
  Kill(server(0));  // it is still among the addresses
  const absl::Time killed = absl::Now();
  ASSERT_TRUE(workers.WaitForMore(40));
  server(1).process().Signal(SIGTERM);
  ASSERT_TRUE(workers.WaitForMore(40));
  EXPECT_EQ(server(1).process().Wait(), 0);
  const std::string fresh = Start().address();
  list_.Set({server(2).address(), fresh});
  ASSERT_TRUE(workers.WaitForMore(80));
  workers.Stop();
  EXPECT_EQ(workers.wrong_, 0);
  for (const Workers::Failure& failure : workers.failures_) {
    EXPECT_TRUE(absl::IsUnavailable(failure.status)) << failure.status;
    EXPECT_THAT(failure.status.message(), HasSubstr(server(0).address()));
    EXPECT_LT(failure.started, killed) << failure.status;
  }
  EXPECT_LE(workers.failures_.size(), 4U);  // what the workers had there
  for (const std::string& address : {server(0).address(), server(1).address(), fresh}) {
    EXPECT_GT(workers.replicas_[address], 0) << address;
  }
  for (const std::string& address : {server(2).address(), fresh}) ExpectNothingHeld(address);
  EXPECT_TRUE(Eventually([&] { return AllReady(*client); }));
  std::vector<std::string> known;
  for (const client::ReplicaState& state : client->Replicas()) known.push_back(state.address);
  EXPECT_THAT(known, ::testing::UnorderedElementsAre(server(2).address(), fresh));
}

// As many as there is room for, wherever that is, and the next one is told that there is none.
TEST_F(ReplicasTest, PromptsFillAllReplicas) {
  StartAll(3, {"--max-sessions", "3"});
  const auto client = Connect();
  client::SessionOptions options;
  options.retry.max_attempts = 2;
  std::map<std::string, int> counts;
  std::vector<std::unique_ptr<client::CompressSession>> sessions;
  for (int i = 0; i < 9; ++i) {
    auto session = client->OpenPrompt(SmallOpen(), options);
    ASSERT_TRUE(session.ok()) << session.status();
    ++counts[(*session)->replica()];
    sessions.push_back(*std::move(session));
  }
  EXPECT_EQ(counts.size(), 3U);
  for (const auto& [address, count] : counts) EXPECT_EQ(count, 3) << address;
  const auto refused = client->OpenPrompt(SmallOpen(), options);
  EXPECT_TRUE(absl::IsResourceExhausted(refused.status())) << refused.status();
  EXPECT_THAT(refused.status().message(), HasSubstr("max_sessions is 3"));
  const std::string freed = sessions[4]->replica();
  sessions.erase(sessions.begin() + 4);
  options.retry.max_attempts = 20;
  const auto next = client->OpenPrompt(SmallOpen(), options);
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_EQ((*next)->replica(), freed);
}

TEST_F(ReplicasTest, LargePromptsGoWhereLeastIsReserved) {
  StartAll(2);
  const auto client = Connect();
  // Straight to the one, by another client.
  client::SessionOptions pinned;
  pinned.replica = server(0).address();
  const auto elsewhere = Connect();
  const auto large = elsewhere->OpenPrompt(SmallOpen(20000), pinned);
  ASSERT_TRUE(large.ok()) << large.status();
  EXPECT_EQ((*large)->replica(), server(0).address());
  // Both have said what they have by now.
  ASSERT_TRUE(Eventually([&] {
    if (!AllReady(*client)) return false;
    for (const client::ReplicaState& state : client->Replicas()) {
      if (state.reserved_bytes > 0) return state.address == server(0).address();
    }
    return false;
  }));
  for (int i = 0; i < 5; ++i) {
    const auto session = client->OpenPrompt(SmallOpen());
    ASSERT_TRUE(session.ok()) << session.status();
    EXPECT_EQ((*session)->replica(), server(1).address());
  }
}

TEST_F(ReplicasTest, WithoutAReplicaTheErrorNamesEach) {
  StartAll(2);
  const auto client = Connect();
  Kill(server(0));
  Kill(server(1));
  const auto session = client->OpenPrompt(SmallOpen());
  EXPECT_TRUE(absl::IsUnavailable(session.status())) << session.status();
  EXPECT_THAT(session.status().message(), HasSubstr("replicas of the test: no replica can take"));
  EXPECT_THAT(session.status().message(), HasSubstr(server(0).address()));
  EXPECT_THAT(session.status().message(), HasSubstr(server(1).address()));
  // A list that is empty for once changes nothing, and one that can be reached ends it.
  list_.Set({});
  absl::SleepFor(absl::Milliseconds(60));
  EXPECT_THAT(client->OpenPrompt(SmallOpen()).status().message(), HasSubstr(server(0).address()));
  list_.Set({Start().address()});
  EXPECT_TRUE(Eventually([&] { return client->OpenPrompt(SmallOpen()).ok(); }));
}

// Silence is told from a prompt's own deadline: a prompt is tried again until one answers.
TEST_F(ReplicasTest, ASilentReplicaIsAskedAgain) {
  StartAll(2);
  client::ClientOptions options;
  options.replicas.load_timeout = absl::Milliseconds(100);
  const auto client = *client::Client::Connect(absl::StrJoin(*list_.Get(), ","), options);
  for (const size_t i : {0, 1}) server(i).process().Signal(SIGSTOP);
  client::SessionOptions once;
  once.retry.max_attempts = 1;
  const absl::Status status = client->OpenPrompt(SmallOpen(), once).status();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_THAT(status.message(), HasSubstr("it did not say its load within 100ms"));
  for (const size_t i : {0, 1}) server(i).process().Signal(SIGCONT);
  EXPECT_TRUE(Eventually([&] { return client->OpenPrompt(SmallOpen()).ok(); }));
}

// What it asked for and never got must not outlive it: gRPC ends the process whose last channel
// goes on one of gRPC's own threads.
TEST_F(ReplicasTest, AClientGoesWhileReplicasAreAsked) {
  StartAll(2);
  for (const size_t i : {0, 1}) server(i).process().Signal(SIGSTOP);
  {
    client::ClientOptions options;
    options.replicas.load_timeout = absl::Seconds(60);
    const auto client = *client::Client::Connect(absl::StrJoin(*list_.Get(), ","), options);
    client::SessionOptions once;
    once.retry.max_attempts = 1;
    once.timeout = absl::Milliseconds(300);
    const absl::Status status = client->OpenPrompt(SmallOpen(), once).status();
    EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
  }
  for (const size_t i : {0, 1}) server(i).process().Signal(SIGCONT);
  absl::SleepFor(absl::Milliseconds(300));  // for an answer to nobody
  EXPECT_TRUE(ConnectTo(absl::StrJoin(*list_.Get(), ","))->OpenPrompt(SmallOpen()).ok());
}

// The one that is asked first says nothing, and leaves time for the one that has the cache.
TEST_F(ReplicasTest, ASilentReplicaHidesNoHeldCache) {
  StartAll(2);
  v1::Open open = SmallOpen();
  open.set_output(v1::OUTPUT_HOLD);
  const auto client = ConnectTo(absl::StrJoin(*list_.Get(), ","));
  std::vector<std::string> addresses = *list_.Get();
  std::sort(addresses.begin(), addresses.end());
  client::SessionOptions last;
  last.replica = addresses[1];
  std::string ran;
  const auto held = CompressOnce(*client, PromptData(open, 3), &ran, absl::ZeroDuration(), last);
  ASSERT_TRUE(held.ok()) << held.status();
  const std::string& handle = held->summary.held().handle();
  ASSERT_TRUE(client->RenewCache(handle).ok());
  ServerAt(addresses[0]).process().Signal(SIGSTOP);
  client::FetchOptions options;
  options.timeout = absl::Seconds(10);
  const auto fetched = client->FetchCache(handle, options);
  EXPECT_TRUE(fetched.ok()) << fetched.status();
  const auto renewed = client->RenewCache(handle, std::nullopt, options);
  EXPECT_TRUE(renewed.ok()) << renewed.status();
  options.timeout = absl::Seconds(3);
  const absl::Status status = client->ReleaseCache(std::string(16, 'x'), options);
  EXPECT_TRUE(absl::IsDeadlineExceeded(status) || absl::IsUnavailable(status)) << status;
  EXPECT_THAT(status.message(), HasSubstr(addresses[0]));
}

// An address that cannot be looked up hides none that is there.
TEST_F(ReplicasTest, OneBadNameHidesNoOther) {
  const std::string address = Start().address();
  const auto client = ConnectTo(address + ",dns:///no-such-name.invalid:1");
  const auto session = client->OpenPrompt(SmallOpen());
  ASSERT_TRUE(session.ok()) << session.status();
  EXPECT_EQ((*session)->replica(), address);
}

TEST_F(ReplicasTest, NamesAreLookedUp) {
  const std::string address = Start().address();
  const std::string port = address.substr(address.rfind(':'));
  const auto client = ConnectTo("dns:///localhost" + port);
  const auto session = client->OpenPrompt(SmallOpen());
  ASSERT_TRUE(session.ok()) << session.status();
  EXPECT_EQ((*session)->replica(), address);
  const auto nobody = ConnectTo("dns:///no-such-name.invalid:1");
  client::SessionOptions once;
  once.retry.max_attempts = 1;
  EXPECT_THAT(nobody->OpenPrompt(SmallOpen(), once).status().message(),
              HasSubstr("no-such-name.invalid has no address"));
}

// A handle is found where the summary says, or by asking all; a server that is gone is named.
TEST_F(ReplicasTest, HeldCachesAreFoundWhereTheyAre) {
  StartAll(3);
  const PromptData plain(SmallOpen(), 3);
  v1::Open open = SmallOpen();
  open.set_output(v1::OUTPUT_HOLD);
  const PromptData data(open, 3);
  const auto prefill = Connect();
  const auto decode = ConnectTo(absl::StrJoin(*list_.Get(), ","));
  const auto whole = Compress(*prefill, plain);
  ASSERT_TRUE(whole.ok()) << whole.status();
  std::string ran;
  const auto held = CompressOnce(*prefill, data, &ran, absl::ZeroDuration());
  ASSERT_TRUE(held.ok()) << held.status();
  const v1::HeldCache& cache = held->summary.held();
  EXPECT_EQ(cache.replica(), ran);
  const auto rows = [](const std::vector<client::LayerResult>& layers) {
    std::string text;
    for (const auto& layer : layers) text += AsText(layer.positions) + AsText(layer.keys);
    return text;
  };
  client::FetchOptions there;
  there.replica = cache.replica();
  for (const client::FetchOptions& options : {there, client::FetchOptions()}) {
    const auto fetched = decode->FetchCache(cache.handle(), options);
    ASSERT_TRUE(fetched.ok()) << fetched.status();
    EXPECT_TRUE(rows(fetched->layers) == rows(whole->layers));
  }
  client::HeldCallOptions renew;
  renew.replica = cache.replica();
  EXPECT_TRUE(decode->RenewCache(cache.handle(), std::nullopt, renew).ok());
  EXPECT_TRUE(decode->RenewCache(cache.handle()).ok());
  EXPECT_TRUE(absl::IsNotFound(decode->RenewCache(std::string(16, 'x')).status()));
  there.replica =
      cache.replica() == server(0).address() ? server(1).address() : server(0).address();
  EXPECT_TRUE(absl::IsNotFound(decode->FetchCache(cache.handle(), there).status()));
  Kill(ServerAt(cache.replica()));
  there.replica = cache.replica();
  for (const client::FetchOptions& options : {there, client::FetchOptions()}) {
    const absl::Status status = decode->FetchCache(cache.handle(), options).status();
    EXPECT_TRUE(absl::IsUnavailable(status)) << status;
    EXPECT_THAT(status.message(), HasSubstr(cache.replica()));
  }
}

}  // namespace
}  // namespace structkv::testkit
