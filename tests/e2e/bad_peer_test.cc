// Peers that vanish, stop reading, or run out of time.
#include <signal.h>

#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/process.h"
#include "tests/testing/service_test.h"

namespace structkv::testkit {
namespace {

using std::chrono::milliseconds;

class BadPeerTest : public ServiceTest {
 protected:
  // Opens a prompt and sends a layer and a half.
  void SendHalf(const PromptData& data, Call* call) {
    call->Send(OpenMessage(data.open()));
    ASSERT_TRUE(call->WaitForOpened().has_value());
    EXPECT_GT(server().sessions().budget().reserved_bytes(), neighbour_bytes());
    call->Send(LayerMessage(data, 0));
    call->Send(PieceMessage(MakePiece(data, 1, v1::TENSOR_KEYS, 0, 64)));
  }
};

TEST_F(BadPeerTest, CancelsInMidLayer) {
  Start();
  const PromptData data(SmallOpen(), 1);
  Call call(channel());
  SendHalf(data, &call);
  call.Cancel();
  ExpectFailure(call.Finish(), grpc::StatusCode::CANCELLED, {});
  ExpectMemoryBack();
}

TEST_F(BadPeerTest, IsKilledInMidLayer) {
  Start();
  for (int i = 0; i < 3; ++i) {
    Process client({STRUCTKV_STALLING_CLIENT, target()});
    ASSERT_TRUE(client.WaitForLine("sent").has_value()) << client.error();
    EXPECT_GT(server().sessions().budget().reserved_bytes(), neighbour_bytes());
    client.Signal(SIGKILL);
    EXPECT_EQ(client.Wait(), 128 + SIGKILL);
    // What is promised for a killed client.
    EXPECT_TRUE(Eventually(
        [&] { return server().sessions().budget().reserved_bytes() == neighbour_bytes(); },
        milliseconds(1500)));
  }
}

// As where its network goes away: the connection stands, but nobody answers.
TEST_F(BadPeerTest, FallsSilentBelowHttp) {
  ServerOptions options = TestOptions();
  options.keepalive_interval = absl::Milliseconds(300);
  options.keepalive_timeout = absl::Milliseconds(300);
  Start(options);
  Process client({STRUCTKV_STALLING_CLIENT, target()});
  ASSERT_TRUE(client.WaitForLine("sent").has_value()) << client.error();
  client.Signal(SIGSTOP);
  ExpectMemoryBack();
  client.Signal(SIGKILL);
}

TEST_F(BadPeerTest, RunsIntoItsDeadline) {
  Start();
  const PromptData data(SmallOpen(), 1);
  CallOptions options;
  options.deadline = milliseconds(300);
  Call call(channel(), options);
  SendHalf(data, &call);
  ExpectFailure(call.Finish(), grpc::StatusCode::DEADLINE_EXCEEDED, {});
  ExpectMemoryBack();
}

TEST_F(BadPeerTest, RunsIntoTheServersCap) {
  ServerOptions options = TestOptions();
  options.streams.session = absl::Milliseconds(300);
  StartAlone(options);
  const PromptData data(SmallOpen(), 1);
  Call call(channel());
  SendHalf(data, &call);
  ExpectFailure(call.Finish(), grpc::StatusCode::DEADLINE_EXCEEDED, {"300ms"});
  ExpectSuccess(data, Run(AllMessages(data)));
}

TEST_F(BadPeerTest, SendsNothing) {
  ServerOptions options = TestOptions();
  options.streams.silence = absl::Milliseconds(300);
  StartAlone(options);
  const PromptData data(SmallOpen(), 1);
  Call silent_from_the_start(channel());
  Call call(channel());
  SendHalf(data, &call);
  ExpectFailure(call.Finish(), grpc::StatusCode::DEADLINE_EXCEEDED, {"silence", "300ms"});
  ExpectFailure(silent_from_the_start.Finish(), grpc::StatusCode::DEADLINE_EXCEEDED,
                {"silence", "300ms"});
  ExpectSuccess(data, Run(AllMessages(data)));
}

// 64 MiB of results: more than every buffer on the way.
class StalledReaderTest : public ServiceTest {
 protected:
  StalledReaderTest() : data_(LargeOpen(), 3) {}

  static v1::Open LargeOpen() {
    v1::Open open = SmallOpen(8192);
    open.mutable_geometry()->set_layer_count(8);
    open.mutable_geometry()->set_key_dim(128);
    open.mutable_method()->mutable_full();
    return open;
  }

  // Sends the whole prompt in pieces of 1 MiB, until the stream is dead.
  void SendAll(Call* call) {
    if (!call->Send(OpenMessage(data_.open()))) return;
    for (uint32_t layer = 0; layer < data_.layers(); ++layer) {
      for (const v1::Tensor tensor : data_.effective().tensors) {
        for (uint64_t at = 0; at < data_.tensor(layer, tensor).size(); at += 1 << 20) {
          if (!call->Send(PieceMessage(MakePiece(data_, layer, tensor, at, 1 << 20)))) return;
        }
      }
    }
    call->Send(CommitMessage(data_));
    call->HalfClose();
  }

  CallOptions NotReading() {
    CallOptions options;
    options.read = false;
    return options;
  }

  const PromptData data_;
};

TEST_F(StalledReaderTest, IsAborted) {
  ServerOptions options = TestOptions();
  options.streams.stall = absl::Milliseconds(400);
  Start(options);
  Call call(channel(), NotReading());
  SendAll(&call);
  ExpectMemoryBack();  // before anything is read
  ExpectFailure(call.Finish(), grpc::StatusCode::ABORTED, {"stall", "400ms"});
}

TEST_F(StalledReaderTest, StallsNobodyElse) {
  Start();
  Call call(channel(), NotReading());
  std::thread sender([&] { SendAll(&call); });
  const auto held = [&] { return server().sessions().budget().reserved_bytes(); };
  ASSERT_TRUE(Eventually([&] { return held() > neighbour_bytes(); }));
  const PromptData other(SmallOpen(), 5);
  for (int i = 0; i < 10; ++i) {
    // On the same connection and on another.
    ExpectSuccess(other, Run(AllMessages(other)));
    ExpectSuccess(other, testkit::Run(NewChannel(target()), AllMessages(other)));
  }
  EXPECT_GT(held(), neighbour_bytes()) << "the stalled prompt must still be there";
  call.Cancel();
  sender.join();
  ExpectFailure(call.Finish(), grpc::StatusCode::CANCELLED, {});
}

// Memory stays within what was reserved, however late the reader starts; then all of it arrives.
TEST_F(StalledReaderTest, MayReadLate) {
  Start();
  Call call(channel(), NotReading());
  std::thread sender([&] { SendAll(&call); });
  ASSERT_TRUE(Eventually(
      [&] { return server().sessions().budget().reserved_bytes() > neighbour_bytes(); }));
  const session::SessionManager& sessions = server().sessions();
  for (int i = 0; i < 100; ++i) {
    EXPECT_LE(static_cast<int64_t>(sessions.buffers().in_use_bytes()),
              sessions.budget().reserved_bytes());
    std::this_thread::sleep_for(milliseconds(5));
  }
  call.StartReading();
  sender.join();
  ExpectSuccess(data_, call.Finish());
}

}  // namespace
}  // namespace structkv::testkit
