// What goes wrong with a pair, or between it and a prompt, fails that prompt alone: its neighbours,
// in messages and over another pair, get the bytes that they would have got, and all memory, files
// and sessions come back.
#include "tests/testing/nccl_fault_test.h"

#include <csignal>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace structkv::testkit {
namespace {

using nccl::testing::FaultNext;
using nccl::testing::LiveComms;
using ::testing::HasSubstr;

constexpr auto kInvalid = grpc::StatusCode::INVALID_ARGUMENT;
constexpr auto kUnavailable = grpc::StatusCode::UNAVAILABLE;
constexpr auto kPrecondition = grpc::StatusCode::FAILED_PRECONDITION;

std::string GroupBytes() { return std::to_string(NcclWorkerOptions().group_bytes); }

class NcclFaultTest : public NcclBesideTest {
 protected:
  // A prompt with the fault `fault` of its pair's next communicator.
  void ExpectFault(const std::string& fault, const std::vector<std::string>& texts) {
    NcclClient client(NewChannel(target()), "faulty");
    FaultNext(fault);
    NcclPrompt prompt(data_, &client);
    ExpectFailure(prompt.Run(channel()), kUnavailable, texts);
  }
  // Clients attach as ever afterwards.
  void ExpectGoesOn() {
    NcclClient client(NewChannel(target()), "next");
    NcclPrompt prompt(data_, &client);
    ExpectResult(prompt.Run(channel()), Inline(data_));
  }
  // The outcome of a prompt whose messages `change` has changed.
  Outcome RunChanged(NcclClient* client,
                     const std::function<void(std::vector<v1::CompressRequest>*)>& change) {
    const NcclPrompt prompt(data_, client);
    std::vector<v1::CompressRequest> messages = prompt.Messages();
    change(&messages);
    return Run(messages);
  }
  // Likewise with the pieces of its first layer.
  void ExpectRefused(NcclClient* client, const std::function<void(v1::TensorPieces*)>& change,
                     const std::string& text) {
    ExpectFailure(
        RunChanged(client, [&](auto* messages) { change((*messages)[1].mutable_pieces()); }),
        kInvalid, {text});
  }

  const PromptData data_{SmallOpen(), 5};
};

TEST_F(NcclFaultTest, TheClientNeverJoins) {
  ExpectFault("never_join@1", {"connecting took longer than 2s"});
  ExpectGoesOn();
}

TEST_F(NcclFaultTest, ATransferHangs) {
  ExpectFault("hang@0", {"a group of transfers took longer than 2s"});
  ExpectGoesOn();
}

TEST_F(NcclFaultTest, NcclReportsAnError) {
  ExpectFault("async_error@0", {"remote process exited or there was a network error"});
  ExpectGoesOn();
}

// The prompt's memory of the GPU is NCCL's until the abort has returned, and nobody else's.
TEST_F(NcclFaultTest, AnAbortTakesItsTime) {
  setenv("FAKE_NCCL_ABORT_MILLIS", "2000", 1);
  // How many prompts' memory is free.
  const auto free = [&backend = server().sessions().backend()] {
    std::vector<std::shared_ptr<std::byte>> taken;
    for (auto one = backend.Reserve(0, 120 << 10); one.ok(); one = backend.Reserve(0, 120 << 10)) {
      taken.push_back(*std::move(one));
    }
    return taken.size();
  };
  const size_t before = free();
  ExpectFault("slow_abort@0", {"a group of transfers took longer than 2s"});
  EXPECT_LT(free(), before);
  EXPECT_TRUE(Eventually([&] { return server().sessions().active_sessions() == 2; }));
  EXPECT_LT(free(), before);
  ExpectGoesOn();
  EXPECT_TRUE(Eventually([&] { return free() == before; }));
}

TEST_F(NcclFaultTest, TheClientDiesInMidTransfer) {
  setenv("FAKE_NCCL_FAULT", "die", 1);
  Process client({STRUCTKV_NCCL_CLIENT, target(), GroupBytes()});
  unsetenv("FAKE_NCCL_FAULT");
  EXPECT_EQ(client.Wait(), 9) << client.output() << client.error();
  ExpectGoesOn();
}

TEST_F(NcclFaultTest, TheClientIsKilledInMidTransfer) {
  setenv("FAKE_NCCL_FAULT", "hang", 1);
  Process client({STRUCTKV_NCCL_CLIENT, target(), GroupBytes()});
  unsetenv("FAKE_NCCL_FAULT");
  ASSERT_TRUE(client.WaitForLine("sent").has_value()) << client.error();
  // The first transfer makes the communicator, at both ends; it is under way soon after.
  EXPECT_TRUE(Eventually([&] { return LiveComms() == comms() + 1; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  client.Signal(SIGKILL);
  EXPECT_EQ(client.Wait(), 128 + SIGKILL);
  ExpectGoesOn();
}

TEST_F(NcclFaultTest, ThePairEndsInMidPrompt) {
  NcclClient client(NewChannel(target()), "leaves");
  NcclPrompt prompt(data_, &client);
  const std::vector<v1::CompressRequest> messages = prompt.Messages();
  Call call(channel());
  call.Send(messages[0]);
  prompt.Offer(0);
  call.Send(messages[1]);
  ASSERT_TRUE(call.WaitForLayer(0));
  client.Detach();
  // It need not send anything to learn it.
  ExpectFailure(call.Finish(), kUnavailable, {"the client gave up: the client ended the pair"});
  ExpectFailure(Run(messages), grpc::StatusCode::NOT_FOUND, {"open.nccl_pair: NCCL pair"});
}

TEST_F(NcclFaultTest, AnOfferOfOtherLengths) {
  NcclClient client(NewChannel(target()), "other");
  {
    NcclPrompt prompt(data_, &client);
    prompt.Offer(0, /*extra_bytes=*/1);
    Call call(channel());
    for (const v1::CompressRequest& message : prompt.Messages()) call.Send(message);
    call.HalfClose();
    ExpectFailure(prompt.Finish(&call), kInvalid, {"transfer '", "buffer 1 has 25601 bytes"});
  }
  // The pair goes on.
  NcclPrompt prompt(data_, &client);
  ExpectResult(prompt.Run(channel()), Inline(data_));
}

TEST_F(NcclFaultTest, ATransferThatIsNotOffered) {
  NcclClient client(NewChannel(target()), "silent");
  NcclPrompt prompt(data_, &client);
  ExpectFailure(Run(prompt.Messages()), grpc::StatusCode::DEADLINE_EXCEEDED,
                {"the client did not offer it within the limit of 2s"});
  // Nor does it take the rows of an answer.
  NcclPrompt deaf(data_, &client);
  for (uint32_t layer = 0; layer < data_.layers(); ++layer) deaf.Offer(layer);
  ExpectFailure(Run(deaf.Messages()), grpc::StatusCode::DEADLINE_EXCEEDED,
                {"transfer 'result/", "the client did not offer it"});
}

TEST_F(NcclFaultTest, ACancelledPromptLeavesThePair) {
  NcclClient client(NewChannel(target()), "cancels");
  {
    NcclPrompt prompt(data_, &client);
    const std::vector<v1::CompressRequest> messages = prompt.Messages();
    Call call(channel());
    for (size_t i = 0; i < 3; ++i) call.Send(messages[i]);
    prompt.Offer(0);
    prompt.Offer(2);  // is withdrawn
    ASSERT_TRUE(call.WaitForLayer(0));
    call.Cancel();
    call.Finish();
  }
  NcclPrompt prompt(data_, &client);
  ExpectResult(prompt.Run(channel()), Inline(data_));
}

TEST_F(NcclFaultTest, PairsThatAreNotTheirs) {
  NcclClient client(NewChannel(target()), "other", "somebody");
  const NcclPrompt prompt(data_, &client);
  ExpectFailure(Run(prompt.Messages()), grpc::StatusCode::NOT_FOUND, {"is not attached"});
  ExpectFailure(
      RunChanged(&client, [](auto* messages) { (*messages)[0].mutable_open()->set_nccl_pair(7); }),
      grpc::StatusCode::NOT_FOUND, {"open.nccl_pair: NCCL pair 7 is not attached"});
  ExpectFailure(
      RunChanged(&client, [](auto* messages) { (*messages)[0].mutable_open()->clear_nccl_pair(); }),
      kPrecondition, {"nccl: open.nccl_pair names none"});
  CallOptions options;
  options.metadata = {{"structkv-tenant", "somebody"}};
  options.deadline = std::chrono::seconds(1);
  ExpectFailure(Run(prompt.Messages(), options), grpc::StatusCode::DEADLINE_EXCEEDED, {});
}

TEST_F(NcclFaultTest, PiecesThatAreRefused) {
  NcclClient client(NewChannel(target()), "client");
  const auto keys = [](v1::TensorPieces* pieces) {
    for (v1::TensorPiece& piece : *pieces->mutable_pieces()) {
      if (piece.tensor() == v1::TENSOR_KEYS) return &piece;
    }
    return pieces->mutable_pieces(0);
  };
  ExpectRefused(
      &client, [&](auto* pieces) { keys(pieces)->set_data("12345678"); },
      "layer 0, keys: the piece has no `transfer`");
  ExpectRefused(
      &client, [&](auto* pieces) { keys(pieces)->mutable_range()->set_size_bytes(64); },
      "layer 0, keys: the piece has no `transfer`");
  ExpectRefused(
      &client, [&](auto* pieces) { keys(pieces)->set_xxh3_64(1); }, "has a checksum");
  ExpectRefused(
      &client, [&](auto* pieces) { keys(pieces)->set_offset_bytes(64); },
      "one transfer of the whole tensor, 25600 bytes");
  ExpectRefused(
      &client, [&](auto* pieces) { keys(pieces)->mutable_transfer()->set_size_bytes(1); },
      "transfer.size_bytes is 1");
  ExpectRefused(
      &client, [&](auto* pieces) { keys(pieces)->mutable_transfer()->set_key(""); },
      "transfer.key has 0 bytes; 1 to 128");
  ExpectRefused(
      &client,
      [&](auto* pieces) { keys(pieces)->mutable_transfer()->set_key(std::string(129, 'k')); },
      "transfer.key has 129 bytes; 1 to 128");
  ExpectRefused(
      &client, [&](auto* pieces) { keys(pieces)->mutable_transfer()->set_key("other"); },
      "transfer.key is another than that of the layer's other tensor");
  ExpectRefused(
      &client,
      [&](auto* pieces) {
        for (v1::TensorPiece& piece : *pieces->mutable_pieces()) {
          if (piece.has_transfer()) continue;
          piece.mutable_transfer()->set_key("k");
        }
      },
      "keys and values of the transport nccl alone have one");
  ExpectFailure(
      RunChanged(&client,
                 [](auto* messages) { (*messages)[0].mutable_open()->clear_transports(); }),
      kInvalid, {"keys and values of the transport nccl alone have one"});
  ExpectFailure(RunChanged(&client,
                           [](auto* messages) {
                             (*messages)[0].mutable_open()->set_pull(v1::PULL_VALUES);
                             (*messages)[0].mutable_open()->set_statistic(v1::STATISTIC_SALIENCY);
                           }),
                kPrecondition, {"nccl: open.pull"});
}

TEST_F(NcclTest, AKeyTwice) {
  StartNccl();
  const PromptData data(SmallOpen(), 5);
  NcclClient client(NewChannel(target()), "twice");
  NcclPrompt prompt(data, &client);
  const std::vector<v1::CompressRequest> messages = prompt.Messages();
  Call call(channel());
  for (size_t i = 0; i < 2; ++i) call.Send(messages[i]);
  call.WaitForOpened();
  ASSERT_TRUE(Eventually([&] { return server().nccl_stats().waiting > 0; }));
  ExpectFailure(Run(messages), grpc::StatusCode::ALREADY_EXISTS, {"waits already"});
  // The first one's transfer still waits, and is the first one's.
  for (uint32_t layer = 0; layer < data.layers(); ++layer) prompt.Offer(layer);
  for (size_t i = 2; i < messages.size(); ++i) call.Send(messages[i]);
  call.HalfClose();
  ExpectResult(prompt.Finish(&call), Inline(data));
}

TEST_F(NcclTest, MemoryOfTheGpuThatIsTaken) {
  StartNccl(Options(), int64_t{192} << 10);
  NcclClient client(channel(), "client");
  const PromptData data(SmallOpen(), 5);
  NcclPrompt prompt(data, &client);
  Call call(channel());
  call.Send(prompt.Messages()[0]);
  ASSERT_TRUE(call.WaitForOpened().has_value());
  NcclPrompt other(data, &client);
  const Outcome refused = Run(other.Messages());
  ExpectFailure(refused, grpc::StatusCode::RESOURCE_EXHAUSTED,
                {"GPU 0: no device memory to reserve for ", " of 196608 are free"});
  EXPECT_EQ(refused.trailers.at("grpc-retry-pushback-ms"), "1000");
  // Messages need none of it.
  ExpectSuccess(data, Run(AllMessages(data)));
  const PromptData large(SmallOpen(2000), 5);
  NcclPrompt never(large, &client);
  std::vector<v1::CompressRequest> messages = never.Messages();
  ExpectFailure(Run(messages), kPrecondition, {"bytes of GPU 0's memory; 196608 are set apart"});
  messages = AllMessages(large);
  messages[0].mutable_open()->add_transports(v1::TRANSPORT_NCCL);
  messages[0].mutable_open()->add_transports(v1::TRANSPORT_INLINE);
  messages[0].mutable_open()->set_nccl_pair(client.pair());
  ExpectSuccess(large, Run(messages));
  call.Cancel();
  call.Finish();
  ExpectNothingReserved();
  NcclPrompt again(data, &client);
  ExpectResult(again.Run(channel()), Inline(data));
}

// A retry takes the place, and the memory, of the stream that it replaces.
TEST_F(NcclTest, ARetryOfAPromptThatHasTheMemory) {
  StartNccl(Options(), int64_t{192} << 10);
  NcclClient client(channel(), "client");
  v1::Open open = SmallOpen();
  open.set_idempotency_key("prompt");
  const PromptData data(open, 5);
  NcclPrompt first(data, &client);
  Call call(channel());
  call.Send(first.Messages()[0]);
  ASSERT_TRUE(call.WaitForOpened().has_value());
  NcclPrompt second(data, &client);
  ExpectResult(second.Run(channel()), Inline(data));
  EXPECT_EQ(call.Finish().status.error_code(), grpc::StatusCode::ABORTED);
}

TEST_F(NcclTest, ADrainWaitsForAPrompt) {
  StartNccl();
  const PromptData data(SmallOpen(), 5);
  const std::string expected = Inline(data);
  NcclNeighbour prompt(NewChannel(target()), &data);
  bool finished = false;
  std::thread drain([&] { finished = server().Drain(absl::Seconds(20)); });
  EXPECT_TRUE(Eventually([&] { return server().sessions().draining(); }));
  ExpectResult(prompt.Finish(), expected);
  drain.join();
  EXPECT_TRUE(finished);
}

TEST_F(NcclTest, TheServerShutsDownUnderAPrompt) {
  StartNccl();
  NcclClient client(channel(), "client");
  const PromptData data(SmallOpen(), 5);
  NcclPrompt prompt(data, &client);
  Call call(channel());
  call.Send(prompt.Messages()[0]);
  call.Send(prompt.Messages()[1]);
  ASSERT_TRUE(call.WaitForOpened().has_value());
  server().Shutdown();
  EXPECT_EQ(call.Finish().status.error_code(), kUnavailable);
}

}  // namespace
}  // namespace structkv::testkit
