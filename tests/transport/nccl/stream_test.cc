// The whole path over gRPC: the service's control streams, the library's, and data over the fake
// NCCL.
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "client/cpp/nccl_stream.h"
#include "gmock/gmock.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "service/rpc/nccl_reactor.h"
#include "service/rpc/nccl_service.h"
#include "tests/testing/fake_nccl/fake_nccl.h"
#include "tests/testing/process.h"
#include "tests/transport/nccl/pair_kit.h"

namespace structkv::nccl::testing {
namespace {

using client::internal::NcclStream;
using ::structkv::testkit::Eventually;
using ::testing::HasSubstr;

constexpr int64_t kMiB = int64_t{1} << 20;

Identity ClientIdentity(int client) {
  return {kProtocolVersion, 22809, "client-" + std::to_string(client), "0000:01:00.0",
          QuickOptions().group_bytes};
}

// A gRPC server with NCCL's service alone.
class NcclServer {
 public:
  explicit NcclServer(std::unique_ptr<rpc::NcclService> service, std::unique_ptr<Hub> hub = nullptr)
      : hub_(std::move(hub)), service_(std::move(service)) {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(service_.get());
    server_ = builder.BuildAndStart();
    address_ = "127.0.0.1:" + std::to_string(port);
  }
  ~NcclServer() { Stop(); }

  void Stop() {
    if (hub_ != nullptr) hub_->EndAll(absl::UnavailableError("the server is draining"));
    server_->Shutdown();
    server_->Wait();
  }
  std::shared_ptr<grpc::Channel> NewChannel() {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    return grpc::CreateCustomChannel(address_, grpc::InsecureChannelCredentials(), arguments);
  }
  Hub* hub() { return hub_.get(); }

 private:
  std::unique_ptr<Hub> hub_;
  std::unique_ptr<rpc::NcclService> service_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
};

class NcclStreamTest : public ::testing::Test {
 protected:
  NcclStreamTest() { FaultNext(""); }

  void Start(const WorkerOptions& options = QuickOptions(), int64_t streams_of_a_peer = 0) {
    auto hub = *Hub::Start(FakeApi(), FakeDeviceApi(), {options, "service"});
    auto service =
        std::make_unique<rpc::NcclService>(std::vector<Hub*>{hub.get()}, *rpc::Identity::Open({}),
                                           rpc::PeerStreams(streams_of_a_peer));
    server_ = std::make_unique<NcclServer>(std::move(service), std::move(hub));
  }

  absl::StatusOr<std::unique_ptr<NcclStream>> Attach(const Identity& identity) {
    return NcclStream::Attach(server_->NewChannel(), worker_.get(), identity, absl::Seconds(10));
  }

  // Outcomes of one transfer from the service to the client, or back.
  absl::Status Exchange(NcclStream* stream, const std::string& key, bool to_client, int64_t bytes,
                        uint64_t seed) {
    Data sent({bytes, 1}, seed);
    Data received({bytes, 1}, 0);
    Outcome outcomes[2];
    server_->hub()->Submit(stream->pair(), key,
                           MakeTransfer(to_client ? Direction::kSend : Direction::kReceive,
                                        to_client ? &sent : &received, outcomes[0].Setter()));
    stream->Offer(key, MakeTransfer(to_client ? Direction::kReceive : Direction::kSend,
                                    to_client ? &received : &sent, outcomes[1].Setter()));
    absl::Status status = outcomes[0].Wait();
    status.Update(outcomes[1].Wait());
    if (status.ok() && !(sent == received)) return absl::DataLossError("other bytes");
    return status;
  }

  std::unique_ptr<NcclServer> server_;
  std::unique_ptr<Worker> worker_ = StartWorker();
};

TEST_F(NcclStreamTest, MovesDataForSeveralClientsAndGivesAllBack) {
  Start();
  const Held before = Held::Now();
  {
    std::vector<std::unique_ptr<NcclStream>> streams;
    for (int i = 0; i < 3; ++i) {
      auto stream = Attach(ClientIdentity(i));
      ASSERT_TRUE(stream.ok()) << stream.status();
      streams.push_back(*std::move(stream));
    }
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) {
      threads.emplace_back([this, i, stream = streams[i].get()] {
        for (int round = 0; round < 4; ++round) {
          EXPECT_EQ(Exchange(stream, std::to_string(round), (round + i) % 2 == 0, 6 * kMiB + round,
                             1 + i * 4 + round),
                    absl::OkStatus());
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(server_->hub()->stats().communicators, (WorkerStats{3, 0}));
  }
  EXPECT_TRUE(Eventually([this] { return server_->hub()->stats().pairs == 0; }));
  EXPECT_TRUE(Eventually([&] {
    const Held now = Held::Now();
    return now.comms == before.comms && now.streams == before.streams && now.files <= before.files;
  })) << ::testing::PrintToString(Held::Now())
      << "; before " << ::testing::PrintToString(before);
}

TEST_F(NcclStreamTest, SaysWhyItRefuses) {
  Start();
  Identity old = ClientIdentity(1);
  old.nccl_version = 22703;
  const absl::Status refused = Attach(old).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("both must have the same NCCL"));
}

// A place is given back with the stream.
TEST_F(NcclStreamTest, AConnectionHasSoManyStreams) {
  Start(QuickOptions(), /*streams_of_a_peer=*/1);
  const auto channel = server_->NewChannel();
  const auto attach = [&](const std::shared_ptr<grpc::Channel>& to, int client) {
    return NcclStream::Attach(to, worker_.get(), ClientIdentity(client), absl::Seconds(10));
  };
  auto first = attach(channel, 1);
  ASSERT_TRUE(first.ok()) << first.status();
  const absl::Status refused = attach(channel, 2).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted) << refused;
  EXPECT_THAT(std::string(refused.message()), HasSubstr("max-streams-per-peer"));
  EXPECT_TRUE(attach(server_->NewChannel(), 3).ok());
  first->reset();
  EXPECT_TRUE(Eventually([&] { return attach(channel, 4).ok(); }));
}

TEST_F(NcclStreamTest, AHostWithoutNcclServesAndSaysSo) {
  const absl::Status why = Api::Load("libnosuchnccl.so.2").status();
  server_ = std::make_unique<NcclServer>(
      std::make_unique<rpc::NcclService>(why, *rpc::Identity::Open({}), rpc::PeerStreams(0)));
  const absl::Status refused = Attach(ClientIdentity(1)).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(refused.message()),
              HasSubstr("no NCCL transport here: no NCCL: libnosuchnccl.so.2"));
}

// Takes all and says nothing, and ends no stream by itself.
class SilentService final : public v1::NcclTransport::Service {
 public:
  grpc::Status Attach(
      grpc::ServerContext* context,
      grpc::ServerReaderWriter<v1::AttachResponse, v1::AttachRequest>* stream) override {
    v1::AttachRequest request;
    while (stream->Read(&request)) {
    }
    EXPECT_TRUE(Eventually([context] { return context->IsCancelled(); }, std::chrono::minutes(2)));
    return grpc::Status::CANCELLED;
  }
};

// However long it may be waited for when a pair ends: not once the caller's time is up.
TEST_F(NcclStreamTest, AServerThatDoesNotAnswerIsLeftAtTheLimit) {
  SilentService service;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  const auto channel =
      grpc::CreateChannel("127.0.0.1:" + std::to_string(port), grpc::InsecureChannelCredentials());
  const absl::Status status =
      NcclStream::Attach(channel, worker_.get(), ClientIdentity(1), absl::Milliseconds(100), "",
                         /*leave_limit=*/absl::InfiniteDuration())
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  server->Shutdown();
}

TEST_F(NcclStreamTest, MessagesThatAreNone) {
  Start();
  const auto raw = [this](const v1::AttachRequest& request) {
    grpc::ClientContext context;
    const auto channel = server_->NewChannel();
    auto stream = v1::NcclTransport::NewStub(channel)->Attach(&context);
    EXPECT_TRUE(stream->Write(request));
    v1::AttachResponse response;
    while (stream->Read(&response)) {
    }
    return stream->Finish();
  };
  EXPECT_EQ(raw(v1::AttachRequest()).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  v1::AttachRequest request;
  request.mutable_finished();
  EXPECT_EQ(raw(request).error_message(), "the first message is not hello");
  request.mutable_broken()->set_why(std::string(rpc::kMaxNcclMessageBytes, 'w'));
  const grpc::Status large = raw(request);
  EXPECT_EQ(large.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(large.error_message(), HasSubstr("at most 1048576 are allowed"));
  EXPECT_TRUE(Eventually([this] { return server_->hub()->stats().pairs == 0; }));
}

TEST_F(NcclStreamTest, AFaultEndsOneStreamAndTheOthersGoOn) {
  Start();
  auto good = Attach(ClientIdentity(1));
  auto bad = Attach(ClientIdentity(2));
  ASSERT_TRUE(good.ok() && bad.ok());
  std::atomic<bool> stop = false;
  std::atomic<int> rounds = 0;
  std::thread worker([&] {
    for (; !stop; ++rounds) {
      EXPECT_EQ(Exchange(good->get(), std::to_string(rounds), rounds % 2 == 0, kMiB, 1 + rounds),
                absl::OkStatus());
    }
  });
  EXPECT_TRUE(Eventually([&] { return rounds > 0; }));
  FaultNext("async_error@0");
  const absl::Status lost = Exchange(bad->get(), "k", true, 8 * kMiB, 1);
  EXPECT_EQ(lost.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(lost.message()), HasSubstr("remote process exited"));
  EXPECT_EQ(Exchange(bad->get(), "again", true, 1, 1).code(), absl::StatusCode::kUnavailable);
  // It may attach again.
  bad = Attach(ClientIdentity(2));
  ASSERT_TRUE(bad.ok()) << bad.status();
  EXPECT_EQ(Exchange(bad->get(), "k", true, 8 * kMiB, 1), absl::OkStatus());
  const int before = rounds;
  EXPECT_TRUE(Eventually([&] { return rounds > before; }));
  stop = true;
  worker.join();
}

TEST_F(NcclStreamTest, TheServerDrains) {
  Start();
  auto stream = Attach(ClientIdentity(1));
  ASSERT_TRUE(stream.ok());
  EXPECT_EQ(Exchange(stream->get(), "k", true, kMiB, 1), absl::OkStatus());
  Data data({1}, 1);
  Outcome waiting;
  (*stream)->Offer("w", MakeTransfer(Direction::kSend, &data, waiting.Setter()));
  server_->Stop();
  EXPECT_EQ(waiting.Wait().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(waiting.Wait().message()), HasSubstr("the server is draining"));
  server_.reset();
}

}  // namespace
}  // namespace structkv::nccl::testing
