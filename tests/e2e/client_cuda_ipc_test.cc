// The client library with memory of a GPU, that of the fake CUDA runtime, and a real server: what
// it collects is what it collects inline, to the byte, and memory, handles and streams come back,
// whatever goes wrong. The client is the server's process, or one of its own.
#include "tests/e2e/client_cuda_ipc.h"

#include <csignal>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/imported_memory.h"
#include "tests/client/fake_server.h"
#include "tests/testing/process.h"
#include "tests/testing/prompt_cases.h"

namespace structkv::testkit {
namespace {

using client::TransportChoice;
using structkv::testing::FakeCuda;
using structkv::testing::FakeHeld;
using ::testing::HasSubstr;

class ClientCudaIpcPeerTest : public ClientCudaIpcTest {
 protected:
  std::unique_ptr<Process> Peer(const std::string& mode) {
    return std::make_unique<Process>(
        std::vector<std::string>{STRUCTKV_CLIENT_GPU_PEER, target(), mode});
  }
  // It ends well and says so, and a neighbour does not notice.
  void ExpectPeer(const std::string& mode, const std::string& says) {
    const PromptData other(SmallOpen(150), 8);
    const std::string undisturbed = ResultBytes(Assemble(Run(AllMessages(other))));
    CountFiles();
    Neighbour neighbour(NewChannel(target()), &other);
    const auto peer = Peer(mode);
    EXPECT_EQ(peer->Wait(std::chrono::seconds(60)), 0) << peer->output() << peer->error();
    EXPECT_THAT(peer->output(), HasSubstr(says));
    EXPECT_TRUE(ResultBytes(Assemble(neighbour.Finish())) == undisturbed);
    EXPECT_TRUE(Eventually([&] { return mapped_bytes() == 0; }));
  }
};

TEST_F(ClientCudaIpcTest, CollectsWhatMessagesGiveOfPromptsOfEveryKind) {
  StartOnGpus(Options());
  for (const char* name : {"StructKv", "StructKvPerKvHead", "StructKvLatent", "StructKvFp8",
                           "StructKvPaged", "StructKvPlan", "StructKvKeepsAll"}) {
    SCOPED_TRACE(name);
    const PromptData data(FindCase(name).open, 41);
    const auto arena = GpuArena(GpuOptions(0, size_t{8} << 20));
    for (const bool results : {true, false}) {
      EXPECT_EQ(ExpectSame(data, arena, InArena(arena, results)), "cuda_ipc");
      EXPECT_EQ(arena->free_bytes(), arena->region()->size());
    }
  }
}

// What is not read in place is copied to the host, and what lies elsewhere to the GPU.
TEST_F(ClientCudaIpcTest, OfTensorsElsewhere) {
  StartOnGpus(Options());
  for (const char* kind : {"StructKv", "StructKvFp8"}) {
    const PromptData data(FindCase(kind).open, 43);
    const std::string expected = Inline(data);
    const auto arena = GpuArena(GpuOptions());
    {
      const auto all = CompressFromGpu(*client_, data, arena, InArena(arena), /*all=*/true);
      ASSERT_TRUE(all.ok()) << all.status();
      EXPECT_TRUE(TextOf(*all, *arena->region()) == expected);
    }
    client::SessionOptions options;
    options.staging = arena;
    for (const TransportChoice choice : {TransportChoice::kAuto, TransportChoice::kCudaIpc}) {
      options.transport = choice;
      const auto staged = client::CompressPrompt(
          *client_, data.open(),
          [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
            return TensorsOf(data, layer);
          },
          options);
      ASSERT_TRUE(staged.ok()) << staged.status();
      EXPECT_EQ(staged->summary.transport(), "cuda_ipc");
      EXPECT_TRUE(Text(*staged) == expected);
      EXPECT_EQ(arena->free_bytes(), arena->region()->size());
    }
  }
}

TEST_F(ClientCudaIpcTest, OfSkeletonRowsInSteps) {
  StartOnGpus(Options());
  const auto arena = GpuArena(GpuOptions());
  ExpectSameInSteps(arena, InArena(arena), "cuda_ipc");
}

TEST_F(ClientCudaIpcTest, PromptsOfABatchOnTwoGpus) {
  StartOnGpus(Options());
  for (const int gpu : {0, 1}) {
    const auto arena = GpuArena(GpuOptions(gpu));
    ExpectSameInABatch(arena, InArena(arena), "cuda_ipc");
  }
}

TEST_F(ClientCudaIpcPeerTest, AProcessOfItsOwn) {
  StartOnGpus(Options());
  ExpectPeer("run", "same");
}

TEST_F(ClientCudaIpcPeerTest, AnAllocationOfTheProgramsOwn) {
  StartOnGpus(Options());
  ExpectPeer("adopt", "same");
}

TEST_F(ClientCudaIpcPeerTest, MemoryUnderACancelledPromptIsFreedOnceItIsClosed) {
  StartOnGpus(Options());
  ExpectPeer("cancel", "freed");
}

TEST_F(ClientCudaIpcPeerTest, AGpuThatTheServerDoesNotHave) {
  FakeCuda::Reset({.count = 1});
  StartOnGpus(Options());
  ExpectPeer(
      "other",
      "FAILED_PRECONDITION: keys and values lie in a GPU's memory, and no transport can read "
      "them: device_uuid is f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1; that of a GPU which computes "
      "here is allowed: f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0 (GPU 0); "
      "StreamOptions.copy_from_gpu would have them copied to the host's");
}

TEST_F(ClientCudaIpcPeerTest, AProcessThatIsKilled) {
  StartOnGpus(Options());
  const PromptData other(SmallOpen(150), 8);
  const std::string undisturbed = ResultBytes(Assemble(Run(AllMessages(other))));
  CountFiles();
  Neighbour neighbour(NewChannel(target()), &other);
  const auto peer = Peer("hang");
  ASSERT_TRUE(peer->WaitForLine("sent").has_value()) << peer->output() << peer->error();
  EXPECT_EQ(FakeCuda::held().imports, 1);
  peer->Signal(SIGKILL);
  peer->Wait();
  EXPECT_TRUE(Eventually([&] { return FakeCuda::held() == held_; }));
  EXPECT_EQ(mapped_bytes(), 0);
  EXPECT_TRUE(ResultBytes(Assemble(neighbour.Finish())) == undisturbed);
}

// Longer than its lease: a thread renews it.
TEST_F(ClientCudaIpcTest, ARegionLivesAsLongAsItsObject) {
  StartOnGpus(Options());
  client::RegionOptions region = GpuOptions();
  region.lease = absl::Milliseconds(300);
  auto arena = GpuArena(region);
  ASSERT_TRUE(client_->Register(*arena->region()).ok());
  absl::SleepFor(absl::Milliseconds(700));
  EXPECT_EQ(server().regions()->regions(), 1);
  EXPECT_EQ(ExpectSame(PromptData(SmallOpen(), 59), arena, InArena(arena)), "cuda_ipc");
  arena = nullptr;
  EXPECT_TRUE(Eventually([&] { return FakeCuda::held() == held_; }));
  EXPECT_EQ(server().regions()->regions(), 0);
}

// Another server says that it listens at this process's region socket: it gets a registration of
// its own, and neither the process's id nor addresses to be used.
TEST_F(ClientCudaIpcTest, AServerElsewhereThatNamesThisProcess) {
  StartOnGpus(Options());
  client::FakeServer elsewhere(
      [](int, grpc::ServerContext*, client::Stream*) { return grpc::Status::CANCELLED; });
  elsewhere.region_socket = socket_path();
  elsewhere.transports = {"cuda_ipc"};
  std::vector<v1::CudaIpcMemory> told;
  elsewhere.regions.on_register = [&](const v1::RegisterRegionRequest& request,
                                      v1::RegisterRegionResponse* response) {
    told.push_back(request.cuda_ipc());
    response->set_handle(std::string(16, 'x'));
    return grpc::Status::OK;
  };
  const auto other = client::ClientOf(elsewhere);
  const auto arena = GpuArena(GpuOptions());
  ASSERT_TRUE(client_->Register(*arena->region()).ok());
  ASSERT_TRUE(other->Register(*arena->region()).ok());
  ASSERT_EQ(told.size(), 1);
  EXPECT_NE(told[0].exporter_id(), ProcessId());
  EXPECT_EQ(told[0].event_address(), 0);
  EXPECT_EQ(ExpectSame(PromptData(SmallOpen(), 59), arena, InArena(arena)), "cuda_ipc");
}

// Each client registers a region, and takes that with it once another one does.
TEST_F(ClientCudaIpcTest, ARegionOfSeveralClients) {
  StartOnGpus(Options());
  const auto arena = GpuArena(GpuOptions());
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(ExpectSame(PromptData(SmallOpen(), 59), arena, InArena(arena)), "cuda_ipc");
    client_ = NewClient(target());
  }
  const auto second = NewClient(target());
  ASSERT_TRUE(client_->Register(*arena->region()).ok());
  ASSERT_TRUE(second->Register(*arena->region()).ok());
  EXPECT_TRUE(Eventually([&] { return server().regions()->regions() == 2; }));
}

// The server loses the region, as one that was restarted has: the next prompt registers it again.
TEST_F(ClientCudaIpcTest, ARegionThatTheServerHasLost) {
  StartOnGpus(Options());
  const auto arena = GpuArena(GpuOptions());
  const PromptData data(SmallOpen(), 67);
  EXPECT_EQ(ExpectSame(data, arena, InArena(arena)), "cuda_ipc");
  for (const TransportChoice choice : {TransportChoice::kAuto, TransportChoice::kCudaIpc}) {
    client::SessionOptions options = InArena(arena);
    options.transport = choice;
    auto session = client_->OpenPrompt(data.open(), options);
    ASSERT_TRUE(session.ok()) << session.status();
    ASSERT_EQ((*session)->open().regions_size(), 1);
    v1::UnregisterRegionRequest request;
    request.set_handle((*session)->open().regions(0));
    grpc::ClientContext context;
    v1::UnregisterRegionResponse response;
    ASSERT_TRUE(Regions()->UnregisterRegion(&context, request, &response).ok());
    session->reset();
    EXPECT_EQ(ExpectSame(data, arena, options), "cuda_ipc");
  }
}

// Nobody says that the memory is closed: it is kept until the lease has ended, and a while more.
// A prompt at another server does not notice.
TEST_F(ClientCudaIpcTest, MemoryOfAServerThatIsGoneIsInQuarantine) {
  StartOnGpus(Options());
  const auto elsewhere = Server::Start(TestOptions(), *cpu::CreateCpuBackend());
  ASSERT_TRUE(elsewhere.ok()) << elsewhere.status();
  const auto to_elsewhere = NewChannel("127.0.0.1:" + std::to_string((*elsewhere)->port()));
  const PromptData other(SmallOpen(150), 8);
  const std::string undisturbed =
      ResultBytes(Assemble(testkit::Run(to_elsewhere, AllMessages(other))));
  Neighbour neighbour(to_elsewhere, &other);
  client::RegionOptions region = GpuOptions();
  region.lease = absl::Milliseconds(300);
  region.quarantine = absl::Seconds(6);
  auto arena = GpuArena(region);
  auto session = client_->OpenPrompt(SmallOpen(), InArena(arena));
  ASSERT_TRUE(session.ok()) << session.status();
  const absl::Time heard = absl::Now();
  StopUnderPrompts();
  const FakeHeld without_server = FakeCuda::held();
  EXPECT_EQ((*session)->Wait().status().code(), absl::StatusCode::kUnavailable);
  session->reset();
  arena = nullptr;
  EXPECT_EQ(FakeCuda::held().device_bytes, without_server.device_bytes);
  EXPECT_TRUE(Eventually([] { return FakeCuda::held() == FakeHeld(); }, std::chrono::seconds(60)));
  EXPECT_GT(absl::Now() - heard, absl::Seconds(4));
  EXPECT_TRUE(ResultBytes(Assemble(neighbour.Finish())) == undisturbed);
}

TEST_F(ClientCudaIpcTest, WhatCannotBeHadIsSaid) {
  StartOnGpus(Options());
  client::RegionOptions region = GpuOptions();
  region.cuda_library = "libno-such-cuda.so.1";
  absl::Status status = client::Region::Create(region).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("no CUDA driver: libno-such-cuda.so.1: "));
  region.cuda_library = "libc.so.6";
  EXPECT_THAT(std::string(client::Region::Create(region).status().message()),
              HasSubstr("no CUDA driver: libc.so.6 has no cuInit"));
  status = client::Region::Create(GpuOptions(2)).status();
  EXPECT_THAT(std::string(status.message()), HasSubstr("GPU 2: cuDeviceGet: "));
  status = client::Region::Create(GpuOptions(0, size_t{1} << 40)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("a region of 1099511627776 bytes on GPU 0: cuMemAlloc: "));
  EXPECT_EQ(FakeCuda::held(), held_);
  FakeCuda::FailDeviceCount(cudaErrorInsufficientDriver);
  EXPECT_THAT(std::string(client::Region::Create(GpuOptions()).status().message()),
              HasSubstr("cuInit: cudaErrorInsufficientDriver"));
  FakeCuda::FailDeviceCount(cudaSuccess);

  const auto arena = GpuArena(GpuOptions());
  const PromptData data(SmallOpen(), 3);
  const auto refused = [&](const client::SessionOptions& options) {
    return std::string(CompressFromGpu(*client_, data, arena, options).status().message());
  };
  client::SessionOptions options = InArena(arena);
  options.transport = TransportChoice::kSharedMemory;
  EXPECT_EQ(refused(options), "shared memory: the regions are memory of a GPU, for CUDA IPC");
  options.transport = TransportChoice::kInline;
  EXPECT_THAT(refused(options), HasSubstr("no transport can read them: inline was asked for"));
  options.copy_from_gpu = true;
  EXPECT_EQ(ExpectSame(data, arena, options), "inline");
  client::RegionOptions on_host;
  on_host.size_bytes = 4096;
  const auto host = client::Region::Create(on_host);
  options.regions.insert(options.regions.begin(), *host);  // and a GPU's memory behind it
  EXPECT_THAT(refused(options), HasSubstr("inline: some regions"));
  options.regions.erase(options.regions.begin());
  options.transport = TransportChoice::kAuto;
  options.regions.push_back(*host);
  EXPECT_THAT(refused(options), HasSubstr("some regions"));
  options.regions = {arena->region(), *client::Region::Create(GpuOptions(1))};
  EXPECT_THAT(refused(options), HasSubstr("are memory of GPU 0 and some of GPU 1"));
  options = client::SessionOptions();
  options.transport = TransportChoice::kCudaIpc;
  EXPECT_EQ(refused(options), "CUDA IPC: no region was given (StreamOptions.regions)");
  options.regions = {*host};
  EXPECT_EQ(refused(options), "CUDA IPC: the regions are memory of the host");
  v1::Open pulls = data.open();
  pulls.set_pull(v1::PULL_VALUES);
  EXPECT_THAT(std::string(client_->OpenPrompt(pulls, InArena(arena)).status().message()),
              HasSubstr("Open.pull: keys and values lie in a GPU's memory"));
  EXPECT_TRUE(arena->region()->IsOnGpu(arena->region()->data()));
  EXPECT_FALSE(arena->region()->IsOnGpu((*host)->data()));
  EXPECT_FALSE((*host)->IsOnGpu(arena->region()->data()));
  EXPECT_EQ((*host)->Record(nullptr).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(arena->region()->Write(arena->region()->size(), AsBytes("x")).code(),
            absl::StatusCode::kInvalidArgument);
}

// A server that computes on the CPU, and one that has no regions, as older ones.
TEST_F(ClientCudaIpcTest, ServersThatCannotAreTakenInlineWhereThatIsAllowed) {
  const PromptData data(SmallOpen(300), 71);
  for (const bool regions : {true, false}) {
    StartOnCpu(regions ? Options() : TestOptions());
    {
      const auto arena = GpuArena(GpuOptions());
      const std::string why = "the server has no CUDA IPC (GetCapabilitiesResponse.";
      for (const TransportChoice choice : {TransportChoice::kAuto, TransportChoice::kCudaIpc}) {
        client::SessionOptions options = InArena(arena);
        options.transport = choice;
        const absl::Status refused = CompressFromGpu(*client_, data, arena, options).status();
        EXPECT_THAT(std::string(refused.message()), HasSubstr(why));
        EXPECT_EQ(refused.code() == absl::StatusCode::kUnimplemented,
                  choice == TransportChoice::kCudaIpc);
      }
      client::SessionOptions options = InArena(arena);
      options.copy_from_gpu = true;
      options.on_opened = [&](const v1::Opened& opened) {
        EXPECT_THAT(opened.transport_reason(), HasSubstr(why));
      };
      EXPECT_EQ(ExpectSame(data, arena, options), "inline");
      options.results = nullptr;
      EXPECT_EQ(ExpectSame(data, arena, options), "inline");
      EXPECT_EQ(arena->free_bytes(), arena->region()->size());
    }
    EXPECT_EQ(FakeCuda::held(), held_);
    client_ = nullptr;
    Stop();
  }
}

}  // namespace
}  // namespace structkv::testkit
