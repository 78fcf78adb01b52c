// Sessions whose keys and values come by transfers: a transport of which the test says when each
// transfer ends, and on which thread.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/backend_registry.h"
#include "tests/session/session_probe.h"
#include "tests/testing/engine_answer.h"
#include "tests/testing/prompt_cases.h"
#include "tests/testing/shards.h"

namespace structkv::session {
namespace {

// A GPU's memory, as a session sees it, is the host's.
class HandTransport final : public transport::Transport, private transport::Transfers {
 public:
  explicit HandTransport(const transport::PromptSizes& sizes) : sizes_(sizes) {}

  transport::Kind kind() const override { return transport::Kind::kNccl; }
  bool in_place() const override { return true; }
  bool host_readable() const override { return false; }
  const transport::Transfers* transfers() const override { return this; }
  absl::StatusOr<engine::Buffer> Resolve(const transport::RegionRange&) const override {
    return absl::InvalidArgumentError("no ranges");
  }
  absl::StatusOr<engine::Buffer> ResolveInPlace(const transport::RegionRange&) const override {
    return absl::InvalidArgumentError("no ranges");
  }
  absl::Status Reserve() override {
    if (reserved_ || --taken_ < 0) {
      reserved_ = true;
      return absl::OkStatus();
    }
    return absl::ResourceExhaustedError("the memory is taken");
  }
  // Memory is free at the `tries`th try from now on.
  static void FreeAfter(int tries) { taken_ = tries; }
  bool gives_room() const override { return false; }
  void GiveRoom(engine::LayerInput* input) const override {
    input->keys = Room(sizes_.input_key_bytes);
    input->values = Room(sizes_.input_value_bytes);
  }
  transport::ResultPlace result_place() const override { return {}; }
  absl::Status Check() const override { return absl::OkStatus(); }
  // Called by the thread that computes.
  absl::Status Await() const override {
    computing_ = std::this_thread::get_id();
    return absl::OkStatus();
  }
  std::thread::id computing() const { return computing_; }

  bool waits(const std::string& key) const {
    const std::lock_guard lock(mutex_);
    return waiting_.contains(key);
  }
  // The transfer ends, on the caller's thread.
  void End(const std::string& key, const std::string& keys, const std::string& values,
           const absl::Status& status = absl::OkStatus()) {
    Waiting ended;
    {
      const std::lock_guard lock(mutex_);
      ended = std::move(waiting_.extract(key).mapped());
    }
    std::copy_n(keys.data(), keys.size(), reinterpret_cast<char*>(ended.keys));
    std::copy_n(values.data(), values.size(), reinterpret_cast<char*>(ended.values));
    ended.done(status);
  }

 private:
  struct Waiting {
    std::byte* keys = nullptr;
    std::byte* values = nullptr;
    std::shared_ptr<const void> key_owner;
    std::shared_ptr<const void> value_owner;
    Done done;
  };

  static engine::Buffer Room(int64_t bytes) {
    auto memory = std::make_shared<std::vector<std::byte>>(static_cast<size_t>(bytes));
    return engine::Buffer::Lent(memory->data(), memory->size(), memory);
  }
  void Receive(const std::string& key, const engine::LayerInput& input, Done done) const override {
    const std::lock_guard lock(mutex_);
    waiting_[key] = {input.keys.data(), input.values.data(), input.keys.owner(),
                     input.values.owner(), std::move(done)};
  }
  void Send(const engine::LayerOutput&, Done done) const override { done(absl::OkStatus()); }

  static inline int taken_ = 0;

  const transport::PromptSizes sizes_;
  bool reserved_ = false;
  mutable std::atomic<std::thread::id> computing_;
  mutable std::mutex mutex_;
  mutable std::map<std::string, Waiting> waiting_;
};

class SessionTransferTest : public ::testing::Test {
 protected:
  SessionTransferTest() {
    options_.idle_buffer_bytes = 0;
    options_.threads = 2;
    options_.transports[transport::Kind::kNccl] =
        transport::Grant([this](const auto&, const transport::PromptSizes& sizes) {
          return transport_ = std::make_shared<HandTransport>(sizes);
        });
    manager_ = std::make_unique<SessionManager>(options_, *CreateBackend("auto"));
  }

  static SessionRequest Request(const testkit::PromptData& data, bool by_transfer = true) {
    SessionRequest request = {.spec = testkit::SpecOf(data.open())};
    if (by_transfer) request.transport.wishes = {transport::Kind::kNccl};
    return request;
  }
  std::shared_ptr<Session> Open(const SessionRequest& request) {
    absl::StatusOr<std::shared_ptr<Session>> session = manager_->Open(request);
    EXPECT_TRUE(session.ok()) << session.status();
    return session.ok() ? *std::move(session) : nullptr;
  }
  // The first layer, its keys and values by the transfer "k" where `by_transfer`.
  static InputMessage FirstLayer(const testkit::PromptData& data, const engine::PromptSpec& spec,
                                 bool by_transfer = true) {
    InputMessage message = MessageOf(LayerPieces(data, spec, 0));
    for (InputPiece& piece : message.pieces) {
      if (!by_transfer || (piece.tensor != engine::InputTensor::kKeys &&
                           piece.tensor != engine::InputTensor::kValues)) {
        continue;
      }
      piece.transfer = {.key = "k", .size_bytes = piece.data[0].size()};
      piece.data.clear();
    }
    return message;
  }
  void EndTransfer(const testkit::PromptData& data, const absl::Status& status = absl::OkStatus()) {
    ASSERT_TRUE(Eventually([&] { return transport_->waits("k"); }));
    transport_->End("k", data.tensor(0, v1::TENSOR_KEYS), data.tensor(0, v1::TENSOR_VALUES),
                    status);
  }
  static bool WaitForLayer(const Probe& probe) {
    return probe.WaitFor([](const Seen& seen) { return seen.answer.layers.size() == 1; });
  }

  SessionManagerOptions options_;
  std::shared_ptr<HandTransport> transport_;  // the last that was granted
  std::unique_ptr<SessionManager> manager_;
};

// Whoever tells of a transfer's end must not be held up: it may be a GPU's only thread.
TEST_F(SessionTransferTest, WhatFollowsFromATransferIsDoneByThePool) {
  const testkit::PromptData data(testkit::SmallOpen(), 9);
  const auto probe = std::make_shared<Probe>();
  const std::shared_ptr<Session> session = Open(Request(data));
  SessionCallbacks callbacks = probe->Callbacks();
  std::thread::id told;
  callbacks.failed = [&told, failed = std::move(callbacks.failed)](absl::Status status) mutable {
    told = std::this_thread::get_id();
    failed(std::move(status));
  };
  session->Start(std::move(callbacks));
  session->Append(FirstLayer(data, session->spec()));
  EndTransfer(data, absl::UnavailableError("the pair is gone"));
  ASSERT_TRUE(probe->WaitFor([](const Seen& seen) { return seen.failed.has_value(); }));
  EXPECT_EQ(probe->seen().failed, absl::UnavailableError("the pair is gone"));
  EXPECT_NE(told, std::this_thread::get_id());
}

// The memory of what is under way for the session that is replaced comes back a little later.
TEST_F(SessionTransferTest, ARetryWaitsForTheMemoryOfWhatItReplaces) {
  const testkit::PromptData data(testkit::SmallOpen(), 9);
  SessionRequest request = Request(data);
  request.idempotency_key = "prompt";
  const std::shared_ptr<Session> first = Open(request);
  HandTransport::FreeAfter(5);
  const std::shared_ptr<Session> second = Open(request);
  // Nobody else waits.
  HandTransport::FreeAfter(1);
  EXPECT_EQ(manager_->Open(Request(data)).status(),
            absl::ResourceExhaustedError("the memory is taken"));
}

class GroupTransferTest : public SessionTransferTest {
 protected:
  // Rank 0 sends messages, rank 1 has transfers.
  void SetUp() override {
    for (size_t rank = 0; rank < 2; ++rank) {
      SessionRequest request = Request(whole_, /*by_transfer=*/rank == 1);
      request.shard = engine::ShardMember{
          .group_id = "group",
          .shard_count = 2,
          .shard_index = static_cast<int64_t>(rank),
          .heads = *engine::EvenShard(request.spec.geometry, 2, static_cast<int64_t>(rank))};
      own_[rank] = engine::ShardSpec(request.spec, request.shard->heads);
      sessions_[rank] = Open(request);
    }
    for (size_t rank = 0; rank < 2; ++rank) {
      sessions_[rank]->Start(probes_[rank]->Callbacks());
    }
  }
  void Append(size_t rank) {
    sessions_[rank]->Append(FirstLayer(parts_[rank], own_[rank], /*by_transfer=*/rank == 1));
  }

  const testkit::PromptData whole_{testkit::SmallOpen(), 9};
  const std::vector<testkit::PromptData> parts_ = testkit::SplitByRanks(whole_, 2);
  const std::shared_ptr<Probe> probes_[2] = {std::make_shared<Probe>(), std::make_shared<Probe>()};
  engine::PromptSpec own_[2];
  std::shared_ptr<Session> sessions_[2];
};

TEST_F(GroupTransferTest, ALayerOfAGpusMemoryIsComputedByThePool) {
  Append(1);
  EndTransfer(parts_[1]);
  // Its part is there, so that the other rank's completes the layer.
  EXPECT_TRUE(Eventually([&] { return sessions_[1]->turn() == Turn::kServers; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  Append(0);
  for (const std::shared_ptr<Probe>& probe : probes_) EXPECT_TRUE(WaitForLayer(*probe));
  EXPECT_NE(transport_->computing(), std::this_thread::get_id());
}

TEST_F(GroupTransferTest, ATransferUnderWayIsNoStandstill) {
  Append(0);
  Append(1);
  constexpr absl::Duration kLimit = absl::Milliseconds(20);
  for (int i = 0; i < 10; ++i) {
    for (const std::shared_ptr<Session>& session : sessions_) session->CheckPeers(kLimit);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EndTransfer(parts_[1]);
  for (const std::shared_ptr<Probe>& probe : probes_) EXPECT_TRUE(WaitForLayer(*probe));
}

}  // namespace
}  // namespace structkv::session
