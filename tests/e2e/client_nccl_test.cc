// The client library by NCCL, on the fake CUDA runtime and the fake library, and a real server:
// what it collects is what it collects inline, to the byte, and others go on whatever goes wrong.
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "client/cpp/nccl_device.h"
#include "gmock/gmock.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "structkv/v1/compression.grpc.pb.h"
#include "structkv/v1/nccl.grpc.pb.h"
#include "tests/e2e/client_gpu_test.h"
#include "tests/testing/nccl_test.h"
#include "tests/testing/process.h"
#include "tests/testing/prompt_cases.h"

namespace structkv::testkit {
namespace {

using client::TransportChoice;
using structkv::testing::FakeCuda;
using ::testing::HasSubstr;

// A GPU of a client whose host has that name.
std::shared_ptr<client::NcclGpu> NewGpu(
    const std::string& host, bool impatient = false,
    const nccl::DeviceApi& device_api = nccl::testing::FakeDeviceApi(),
    absl::Duration attach_limit = absl::Seconds(10)) {
  auto device = client::internal::NcclDevice::Start(
      nccl::testing::FakeApi(), device_api, NcclWorkerOptions(impatient), host, attach_limit);
  EXPECT_TRUE(device.ok()) << device.status();
  return std::make_shared<client::NcclGpu>(*std::move(device));
}

// Says that it has NCCL, and nothing to who attaches.
class SilentServer final : public v1::Compression::Service, public v1::NcclTransport::Service {
 public:
  SilentServer() {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(static_cast<v1::Compression::Service*>(this));
    builder.RegisterService(static_cast<v1::NcclTransport::Service*>(this));
    server_ = builder.BuildAndStart();
    client_ = *client::Client::Connect(absl::StrCat("127.0.0.1:", port));
  }
  client::Client& client() { return *client_; }

  grpc::Status GetCapabilities(grpc::ServerContext* /*context*/,
                               const v1::GetCapabilitiesRequest* /*request*/,
                               v1::GetCapabilitiesResponse* response) override {
    response->add_transports("nccl");
    return grpc::Status::OK;
  }
  grpc::Status Attach(
      grpc::ServerContext* /*context*/,
      grpc::ServerReaderWriter<v1::AttachResponse, v1::AttachRequest>* stream) override {
    v1::AttachRequest request;
    while (stream->Read(&request)) {
    }
    return grpc::Status::OK;
  }

 private:
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<client::Client> client_;
};

class ClientNcclTest : public ClientGpuTest<NcclTest> {
 protected:
  void StartServer(const ServerOptions& options = Options()) {
    StartNccl(options);
    Connect();
    comms_ = nccl::testing::LiveComms();
  }
  void TearDown() override {
    client_ = nullptr;
    gpu_ = nullptr;
    EXPECT_TRUE(Eventually([&] { return FakeCuda::held() == held_; }));
  }

  client::SessionOptions ByNccl(const std::shared_ptr<client::Arena>& arena) {
    client::SessionOptions options = InArena(arena);
    options.transport = TransportChoice::kNccl;
    options.nccl = gpu_;
    return options;
  }
  std::shared_ptr<client::NcclGpu> gpu_ = NewGpu("client");
  int comms_ = 0;
};

TEST_F(ClientNcclTest, CollectsWhatMessagesGiveOfPromptsOfEveryKind) {
  StartServer();
  for (const char* name : {"StructKv", "StructKvPerKvHead", "StructKvLatent", "StructKvFp8",
                           "StructKvPaged", "StructKvPlan", "StructKvKeepsAll"}) {
    SCOPED_TRACE(name);
    const PromptData data(FindCase(name).open, 41);
    const auto arena = GpuArena(GpuOptions());
    EXPECT_EQ(ExpectSame(data, arena, ByNccl(arena)), "nccl");
    EXPECT_TRUE(Eventually([&] { return arena->free_bytes() == arena->region()->size(); }));
  }
}

TEST_F(ClientNcclTest, AutoTakesItWhereThereIsNoCudaIpc) {
  StartServer();
  const auto arena = GpuArena(GpuOptions());
  const PromptData data(SmallOpen(200), 43);
  client::SessionOptions options = ByNccl(arena);
  options.transport = TransportChoice::kAuto;
  options.on_opened = [](const v1::Opened& opened) {
    EXPECT_THAT(opened.transport_reason(), HasSubstr("the server has no CUDA IPC"));
  };
  EXPECT_EQ(ExpectSame(data, arena, options), "nccl");
  // Tensors of the host by staging, where keys and values would else be refused.
  options.regions.clear();
  options.staging = arena;
  const auto staged = client::CompressPrompt(
      *client_, data.open(),
      [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
        return TensorsOf(data, layer);
      },
      options);
  ASSERT_TRUE(staged.ok()) << staged.status();
  EXPECT_TRUE(TextOf(*staged, *arena->region()) == Inline(data));
}

TEST_F(ClientNcclTest, OfSkeletonRowsInSteps) {
  StartServer();
  const auto arena = GpuArena(GpuOptions());
  ExpectSameInSteps(arena, ByNccl(arena), "nccl");
}

TEST_F(ClientNcclTest, PromptsOfABatchShareThePair) {
  StartServer();
  const auto arena = GpuArena(GpuOptions());
  ExpectSameInABatch(arena, ByNccl(arena), "nccl");
  EXPECT_EQ(nccl::testing::LiveComms(), comms_ + 2);
}

TEST_F(ClientNcclTest, CancelledPromptsLeaveThePairAndTheirMemory) {
  StartServer();
  const auto arena = GpuArena(GpuOptions());
  const PromptData data(SmallOpen(300), 61);
  for (int i = 0; i < 10; ++i) {
    auto session = client_->OpenPrompt(data.open(), ByNccl(arena));
    ASSERT_TRUE(session.ok()) << session.status();
    ASSERT_TRUE((*session)->SendLayer(0, *GpuLayer(arena.get(), data, 0)).ok());
    (*session)->Cancel();
  }
  EXPECT_TRUE(Eventually([&] { return arena->free_bytes() == arena->region()->size(); }));
  EXPECT_EQ(ExpectSame(data, arena, ByNccl(arena)), "nccl");
}

// The session ends while keys, or values, are copied to be offered.
TEST_F(ClientNcclTest, WhatIsOfferedAfterTheEndIsTakenBack) {
  StartServer();
  const auto arena = GpuArena(GpuOptions());
  const PromptData data(SmallOpen(300), 61);
  client::SessionOptions options = ByNccl(arena);
  options.staging = arena;
  for (const int last : {1, 2}) {
    auto session = client_->OpenPrompt(data.open(), options);
    ASSERT_TRUE(session.ok()) << session.status();
    int copies = 0;
    FakeCuda::SetHook([&, sender = std::this_thread::get_id()] {
      if (std::this_thread::get_id() == sender && ++copies == last) (*session)->Cancel();
    });
    EXPECT_FALSE((*session)->SendLayer(0, TensorsOf(data, 0)).ok());
    FakeCuda::SetHook(nullptr);
    EXPECT_GE(copies, last);
    session->reset();
    EXPECT_TRUE(Eventually([&] { return arena->free_bytes() == arena->region()->size(); }));
  }
}

// Keys of one region and values of another one, each behind a record of its own.
TEST_F(ClientNcclTest, TransfersWaitForTheRecordsOfTheirRegions) {
  StartServer();
  nccl::DeviceApi waiting = nccl::testing::FakeDeviceApi();
  waiting.wait_event = [](nccl::Stream*, void* event) {
    return cudaEventSynchronize(static_cast<cudaEvent_t>(event)) == cudaSuccess
               ? absl::OkStatus()
               : absl::InternalError("cudaEventSynchronize");
  };
  gpu_ = NewGpu("client", /*impatient=*/false, waiting);
  const FakeStream streams[2];
  const auto results = GpuArena(GpuOptions());
  const auto first = GpuArena(GpuOptions());
  const auto second = GpuArena(GpuOptions());
  const PromptData data(SmallOpen(200), 43);
  client::SessionOptions options = ByNccl(results);
  options.regions = {results->region(), first->region(), second->region()};
  const auto got = client::CompressPrompt(
      *client_, data.open(),
      [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
        client::LayerTensors tensors = *GpuLayer(first.get(), data, layer);
        const client::LayerTensors values = *GpuLayer(second.get(), data, layer);
        tensors.values = values.values;
        tensors.owner =
            std::make_shared<std::pair<std::shared_ptr<const void>, std::shared_ptr<const void>>>(
                tensors.owner, values.owner);
        WriteLate(tensors.keys, streams[0].get());
        WriteLate(tensors.values, streams[1].get());
        EXPECT_TRUE(first->region()->Record(streams[0].get()).ok());
        EXPECT_TRUE(second->region()->Record(streams[1].get()).ok());
        return tensors;
      },
      options);
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_TRUE(TextOf(*got, *results->region()) == Inline(data));
}

// The prompt, and the region whose event a transfer waits for, are gone while it waits.
TEST_F(ClientNcclTest, ATransferKeepsTheEventThatItWaitsFor) {
  StartServer();
  static absl::Notification waits;
  static absl::Notification goes_on;
  nccl::DeviceApi slow = nccl::testing::FakeDeviceApi();
  slow.wait_event = [](nccl::Stream*, void*) {
    waits.Notify();
    goes_on.WaitForNotification();
    return absl::OkStatus();
  };
  gpu_ = NewGpu("client", /*impatient=*/false, slow);
  const auto elsewhere = GpuArena(GpuOptions());
  auto arena = GpuArena(GpuOptions());
  const std::weak_ptr<const client::internal::GpuMemory> memory = arena->region()->gpu_memory();
  const PromptData data(SmallOpen(300), 61);
  auto session = client_->OpenPrompt(data.open(), ByNccl(arena));
  ASSERT_TRUE(session.ok()) << session.status();
  ASSERT_TRUE((*session)->SendLayer(0, *GpuLayer(elsewhere.get(), data, 0)).ok());
  waits.WaitForNotification();
  session->reset();
  arena = nullptr;
  EXPECT_FALSE(memory.expired());
  goes_on.Notify();
  EXPECT_TRUE(Eventually([&] { return memory.expired(); }));
}

// The communicator fails in the middle: that prompt is UNAVAILABLE, and the next one attaches
// again.
TEST_F(ClientNcclTest, APairThatFailsIsAttachedAgain) {
  StartServer(Options(/*impatient=*/true));
  gpu_ = NewGpu("client", /*impatient=*/true);
  StartNeighbours();
  const auto arena = GpuArena(GpuOptions());
  const PromptData data(SmallOpen(300), 67);
  for (const char* fault : {"async_error@1", "hang@1"}) {
    SCOPED_TRACE(fault);
    nccl::testing::FaultNext(fault);
    client::SessionOptions options = ByNccl(arena);
    options.retry.max_attempts = 1;
    const absl::Status failed = CompressFromGpu(*client_, data, arena, options).status();
    EXPECT_EQ(failed.code(), absl::StatusCode::kUnavailable) << failed;
    nccl::testing::FaultNext("");
    EXPECT_EQ(ExpectSame(data, arena, options), "nccl");
    // Where it may be tried again nobody notices, unless a result came first.
    client_ = *client::Client::Connect(target());
  }
  ExpectNeighboursUndisturbed();
}

// Without a pair, too, auto has CUDA IPC and copies.
TEST_F(ClientNcclTest, AutoDoesWithoutAPairThatIsNotAnswered) {
  const TemporaryDirectory directory;
  ServerOptions options = Options();
  options.regions.socket.path = directory.Path("regions");
  StartServer(options);
  gpu_ = NewGpu("client", /*impatient=*/false, nccl::testing::FakeDeviceApi(),
                /*attach_limit=*/absl::ZeroDuration());
  const auto arena = GpuArena(GpuOptions());
  const PromptData data(SmallOpen(200), 43);
  client::SessionOptions by_auto = ByNccl(arena);
  by_auto.transport = TransportChoice::kAuto;
  by_auto.retry.max_attempts = 1;
  EXPECT_EQ(ExpectSame(data, arena, by_auto), "cuda_ipc");
}

TEST_F(ClientNcclTest, AttachingTakesNoLongerThanThePrompt) {
  StartServer();
  SilentServer silent;
  const auto arena = GpuArena(GpuOptions());
  const PromptData data(SmallOpen(200), 43);
  client::SessionOptions options = ByNccl(arena);
  options.retry.max_attempts = 1;
  // The second waits for the first, and gives up before.
  std::vector<std::thread> threads;
  for (const int64_t millis : {600, 300}) {
    threads.emplace_back([&, options, millis]() mutable {
      options.timeout = absl::Milliseconds(millis);
      const absl::Time begin = absl::Now();
      const absl::Status late = silent.client().OpenPrompt(data.open(), options).status();
      EXPECT_TRUE(absl::IsUnavailable(late)) << late;
      EXPECT_LT(absl::Now() - begin, absl::Seconds(5));  // it may take 10 to attach
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(ClientNcclTest, WhatCannotBeHadIsSaid) {
  StartServer();
  const auto arena = GpuArena(GpuOptions());
  const PromptData data(SmallOpen(), 3);
  const auto refused = [&](const client::SessionOptions& options) {
    return std::string(CompressFromGpu(*client_, data, arena, options).status().message());
  };
  client::SessionOptions options = ByNccl(arena);
  options.results = nullptr;
  EXPECT_EQ(refused(options),
            "NCCL: PromptOptions.results is null, and kept rows are received there");
  options.copy_from_gpu = true;
  EXPECT_EQ(refused(options),
            "NCCL: PromptOptions.results is null, and kept rows are received there");
  options = ByNccl(arena);
  options.nccl = nullptr;
  EXPECT_EQ(refused(options), "NCCL: no GPU was given (StreamOptions.nccl)");
  nccl::DeviceApi elsewhere = nccl::testing::FakeDeviceApi();
  elsewhere.bus_id = [](int) -> absl::StatusOr<std::string> { return "0000:65:00.0"; };
  options.nccl = NewGpu("client", /*impatient=*/false, elsewhere);
  EXPECT_EQ(refused(options),
            "NCCL: StreamOptions.nccl is GPU 0000:65:00.0, and the regions are memory of GPU "
            "0000:00:00.0; both are one");
  options.nccl = gpu_;
  options.regions.clear();
  options.results = nullptr;
  EXPECT_EQ(refused(options), "NCCL: no region was given (StreamOptions.regions)");
  client::NcclOptions missing;
  missing.nccl_library = "libno-such-nccl.so.2";
  EXPECT_THAT(std::string(client::NcclGpu::Open(missing).status().message()),
              HasSubstr("no NCCL: libno-such-nccl.so.2"));
  missing.nccl_library = STRUCTKV_FAKE_NCCL;
  missing.cuda_library = "libno-such-cuda.so.1";
  EXPECT_THAT(std::string(client::NcclGpu::Open(missing).status().message()),
              HasSubstr("no CUDA driver: libno-such-cuda.so.1"));
}

// Without NCCL at the server.
TEST_F(ClientNcclTest, AServerWithoutIt) {
  ServerOptions without = Options();
  without.nccl.library = "libno-such-nccl.so.2";
  StartAlone(without, structkv::testing::MakeFakeBackend());
  Connect();
  const auto arena = GpuArena(GpuOptions());
  const PromptData data(SmallOpen(), 3);
  const absl::Status named = CompressFromGpu(*client_, data, arena, ByNccl(arena)).status();
  EXPECT_EQ(named.code(), absl::StatusCode::kUnimplemented) << named;
  EXPECT_THAT(std::string(named.message()), HasSubstr("no NCCL: libno-such-nccl.so.2"));
  client::SessionOptions options = ByNccl(arena);
  options.transport = TransportChoice::kAuto;
  const absl::Status refused = CompressFromGpu(*client_, data, arena, options).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << refused;
  EXPECT_THAT(std::string(refused.message()), HasSubstr("the server has no CUDA IPC"));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("nccl: the server has no NCCL"));
  options.copy_from_gpu = true;
  EXPECT_EQ(ExpectSame(data, arena, options), "inline");
}

}  // namespace
}  // namespace structkv::testkit
