// Several servers as processes of their own, and clients that find them.
#pragma once

#include <algorithm>
#include <csignal>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "tests/testing/prompt_data.h"
#include "tests/testing/replicas.h"

namespace structkv::testkit {

// A server that has to wait for its processor has not failed.
constexpr absl::Duration kLoadTimeout = absl::Seconds(30);

class ReplicasTest : public ::testing::Test {
 protected:
  // Starts a server, and has it found unless told otherwise.
  ReplicaProcess& Start(const std::vector<std::string>& flags = {}) {
    std::vector<std::string> all = {"--memory-budget", "64MiB",           "--hold-budget",
                                    "16MiB",           "--region-socket", ""};
    all.insert(all.end(), flags.begin(), flags.end());
    servers_.push_back(std::make_unique<ReplicaProcess>(STRUCTKV_SERVER, all));
    ReplicaProcess& server = *servers_.back();
    EXPECT_FALSE(server.address().empty()) << server.process().error();
    return server;
  }
  void StartAll(int count, const std::vector<std::string>& flags = {}) {
    std::vector<std::string> addresses;
    for (int i = 0; i < count; ++i) addresses.push_back(Start(flags).address());
    list_.Set(addresses);
  }
  ReplicaProcess& server(size_t index) { return *servers_[index]; }
  ReplicaProcess& ServerAt(const std::string& address) {
    for (const auto& each : servers_) {
      if (each->address() == address) return *each;
    }
    ADD_FAILURE() << address << " is no server";
    return *servers_.front();
  }
  void Kill(ReplicaProcess& server) {
    server.process().Signal(SIGKILL);
    EXPECT_EQ(server.process().Wait(), 128 + SIGKILL);
  }

  // Whether the client knows all of its replicas as ready, having asked them.
  static bool AllReady(client::Client& client) {
    if (!client.GetCapabilities().ok()) return false;
    const std::vector<client::ReplicaState> states = client.Replicas();
    return std::all_of(states.begin(), states.end(), [](const client::ReplicaState& state) {
      return state.health == client::ReplicaState::Health::kReady;
    });
  }

  // A client of all that are found at the time.
  std::unique_ptr<client::Client> Connect() {
    client::ClientOptions options;
    options.replicas.resolve = [this] { return list_.Get(); };
    options.replicas.resolve_interval = absl::Milliseconds(50);
    options.replicas.load_interval = absl::Milliseconds(50);
    options.replicas.load_timeout = kLoadTimeout;
    return *client::Client::Connect("replicas of the test", options);
  }
  static std::unique_ptr<client::Client> ConnectTo(const std::string& target) {
    client::ClientOptions options;
    options.replicas.load_timeout = kLoadTimeout;
    return *client::Client::Connect(target, options);
  }

  // A server that has no prompt has all of its memory.
  static void ExpectNothingHeld(const std::string& address) {
    const auto client = ConnectTo(address);
    EXPECT_TRUE(Eventually([&] {
      const auto capabilities = client->GetCapabilities();
      return capabilities.ok() && capabilities->limits().memory_available_bytes() ==
                                      capabilities->limits().memory_budget_bytes();
    })) << address;
  }

  AddressList list_;
  std::vector<std::unique_ptr<ReplicaProcess>> servers_;
};

}  // namespace structkv::testkit
