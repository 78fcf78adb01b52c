// The client library with memory of a GPU, that of the fake CUDA runtime, and a real server: what
// it collects is what it collects inline, to the byte, and memory, handles and streams come back,
// whatever goes wrong. The client is the server's process, or one of its own.
#include <csignal>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/e2e/client_gpu.h"
#include "tests/kernels/cuda/fake_backend.h"
#include "tests/testing/process.h"
#include "tests/testing/prompt_cases.h"
#include "tests/testing/region_test.h"

namespace structkv::testkit {
namespace {

using client::TransportChoice;
using structkv::testing::FakeCuda;
using structkv::testing::FakeHeld;
using structkv::testing::MakeFakeBackend;
using ::testing::HasSubstr;

class ClientCudaIpcTest : public RegionTest {
 protected:
  void SetUp() override { FakeCuda::Reset({.count = 2}); }
  void TearDown() override {
    client_ = nullptr;
    if (running()) {
      EXPECT_TRUE(Eventually([&] { return FakeCuda::held() == held_; }));
    }
    EXPECT_EQ(FakeCuda::freed_while_open(), 0);
  }
  static void TearDownTestSuite() { EXPECT_EQ(FakeCuda::held(), FakeHeld()); }

  void StartOnGpus(ServerOptions options) {
    StartAlone(std::move(options), MakeFakeBackend());
    client_ = *client::Client::Connect(target());
    held_ = FakeCuda::held();
  }
  void StartOnCpu(ServerOptions options) {
    StartAlone(std::move(options), *cpu::CreateCpuBackend());
    client_ = *client::Client::Connect(target());
    held_ = FakeCuda::held();
  }
  std::string Inline(const PromptData& data) {
    const auto compressed = CompressInline(*client_, data);
    EXPECT_TRUE(compressed.ok()) << compressed.status();
    return Text(*compressed);
  }
  // Of a session whose tensors all lie in `arena`; the transport's name.
  std::string ExpectSame(const PromptData& data, const std::shared_ptr<client::Arena>& arena,
                         const client::SessionOptions& options) {
    const std::string expected = Inline(data);
    const auto got = CompressFromGpu(*client_, data, arena, options);
    EXPECT_TRUE(got.ok()) << got.status();
    if (!got.ok()) return "";
    EXPECT_TRUE(TextOf(*got, *arena->region()) == expected);
    for (const client::LayerResult& layer : got->layers) {
      if (layer.keys.empty()) continue;
      EXPECT_EQ(arena->region()->OffsetOf(layer.keys.span()).has_value(),
                options.results != nullptr);
    }
    return got->summary.transport();
  }
  std::unique_ptr<Process> Peer(const std::string& mode) {
    return std::make_unique<Process>(
        std::vector<std::string>{STRUCTKV_CLIENT_GPU_PEER, target(), mode});
  }
  // It ends well and says so, and a neighbour does not notice.
  void ExpectPeer(const std::string& mode, const std::string& says) {
    const PromptData other(SmallOpen(150), 8);
    const std::string undisturbed = ResultBytes(Assemble(Run(AllMessages(other))));
    Neighbour neighbour(NewChannel(target()), &other);
    const auto peer = Peer(mode);
    EXPECT_EQ(peer->Wait(std::chrono::seconds(60)), 0) << peer->output() << peer->error();
    EXPECT_THAT(peer->output(), HasSubstr(says));
    EXPECT_TRUE(ResultBytes(Assemble(neighbour.Finish())) == undisturbed);
    EXPECT_TRUE(Eventually([&] { return mapped_bytes() == 0; }));
  }

  std::unique_ptr<client::Client> client_;
  FakeHeld held_;
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
  v1::Open open = SmallOpen(400);
  open.mutable_geometry()->set_layer_count(8);
  v1::StructKvMethod* method = open.mutable_method()->mutable_structkv();
  method->mutable_pivot()->set_mode(v1::PIVOT_MODE_FIXED);
  method->mutable_pivot()->set_fixed_layer(3);
  const auto arena = GpuArena(GpuOptions());
  std::string texts[2];
  for (const bool on_gpu : {false, true}) {
    PromptData data(open, 53);
    client::SessionOptions options = on_gpu ? InArena(arena) : client::SessionOptions();
    options.on_event = [&](const client::Event& event) {
      const auto* layer = std::get_if<client::LayerResult>(&event);
      if (layer != nullptr) texts[on_gpu] += Text(ToHost(*layer, *arena->region()));
    };
    const auto source = [&](uint32_t layer, const client::PivotResult* pivot) {
      if (pivot != nullptr && layer >= *pivot->skeleton_from_layer) {
        data.KeepRows(layer, pivot->skeleton);
      }
      return on_gpu ? GpuLayer(arena.get(), data, layer)
                    : absl::StatusOr<client::LayerTensors>(TensorsOf(data, layer));
    };
    const auto summary = client::StreamPromptInSteps(*client_, open, source, options);
    ASSERT_TRUE(summary.ok()) << summary.status();
    EXPECT_EQ(summary->transport(), on_gpu ? "cuda_ipc" : "inline");
  }
  EXPECT_FALSE(texts[0].empty());
  EXPECT_TRUE(texts[1] == texts[0]);
}

TEST_F(ClientCudaIpcTest, PromptsOfABatchOnTwoGpus) {
  StartOnGpus(Options());
  for (const int gpu : {0, 1}) {
    const auto arena = GpuArena(GpuOptions(gpu));
    std::vector<PromptData> prompts;
    for (const uint32_t tokens : {300, 70, 411}) prompts.emplace_back(SmallOpen(tokens), tokens);
    std::vector<std::map<uint32_t, std::string>> texts(prompts.size());  // by layer
    std::vector<client::BatchPrompt> batch;
    client::SessionOptions options = InArena(arena);
    for (size_t i = 0; i < prompts.size(); ++i) {
      options.on_event = [&, i](const client::Event& event) {
        const auto* layer = std::get_if<client::LayerResult>(&event);
        if (layer != nullptr) texts[i][layer->layer] = Text(ToHost(*layer, *arena->region()));
      };
      batch.push_back({prompts[i].open(), options});
    }
    const auto summaries = client::StreamBatch(
        *client_, batch,
        [&](size_t i, uint32_t layer) { return GpuLayer(arena.get(), prompts[i], layer); },
        options);
    for (size_t i = 0; i < prompts.size(); ++i) {
      ASSERT_TRUE(summaries[i].ok()) << summaries[i].status();
      EXPECT_EQ(summaries[i]->transport(), "cuda_ipc");
      const auto whole = CompressInline(*client_, prompts[i]);
      ASSERT_TRUE(whole.ok()) << whole.status();
      for (const auto& layer : whole->layers) EXPECT_TRUE(texts[i][layer.layer] == Text(layer));
    }
  }
}

TEST_F(ClientCudaIpcTest, AProcessOfItsOwn) {
  StartOnGpus(Options());
  ExpectPeer("run", "same");
}

TEST_F(ClientCudaIpcTest, AnAllocationOfTheProgramsOwn) {
  StartOnGpus(Options());
  ExpectPeer("adopt", "same");
}

TEST_F(ClientCudaIpcTest, MemoryUnderACancelledPromptIsFreedOnceItIsClosed) {
  StartOnGpus(Options());
  ExpectPeer("cancel", "freed");
}

TEST_F(ClientCudaIpcTest, AGpuThatTheServerDoesNotHave) {
  FakeCuda::Reset({.count = 1});
  StartOnGpus(Options());
  ExpectPeer(
      "other",
      "FAILED_PRECONDITION: keys and values lie in a GPU's memory, and no transport can read "
      "them: device_uuid is f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1; that of a GPU which computes "
      "here is allowed: f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0 (GPU 0); "
      "StreamOptions.copy_from_gpu would have them copied to the host's");
}

TEST_F(ClientCudaIpcTest, AProcessThatIsKilled) {
  StartOnGpus(Options());
  const PromptData other(SmallOpen(150), 8);
  const std::string undisturbed = ResultBytes(Assemble(Run(AllMessages(other))));
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
TEST_F(ClientCudaIpcTest, MemoryOfAServerThatIsGoneIsInQuarantine) {
  StartOnGpus(Options());
  client::RegionOptions region = GpuOptions();
  region.lease = absl::Milliseconds(300);
  region.quarantine = absl::Milliseconds(900);
  auto arena = GpuArena(region);
  auto session = client_->OpenPrompt(SmallOpen(), InArena(arena));
  ASSERT_TRUE(session.ok()) << session.status();
  StopUnderPrompts();
  const FakeHeld without_server = FakeCuda::held();
  EXPECT_EQ((*session)->Wait().status().code(), absl::StatusCode::kUnavailable);
  session->reset();
  const absl::Time dropped = absl::Now();
  arena = nullptr;
  EXPECT_EQ(FakeCuda::held().device_bytes, without_server.device_bytes);
  EXPECT_TRUE(Eventually([] { return FakeCuda::held() == FakeHeld(); }));
  EXPECT_GT(absl::Now() - dropped, absl::Milliseconds(600));
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
  options.transport = TransportChoice::kAuto;
  options.regions.push_back(*host);
  EXPECT_THAT(refused(options), HasSubstr("some regions"));
  options = client::SessionOptions();
  options.transport = TransportChoice::kCudaIpc;
  EXPECT_EQ(refused(options), "CUDA IPC: no region was given (StreamOptions.regions)");
  options.regions = {*host};
  EXPECT_EQ(refused(options), "CUDA IPC: the regions are memory of the host");
  v1::Open pulls = data.open();
  pulls.set_pull(v1::PULL_VALUES);
  EXPECT_THAT(std::string(client_->OpenPrompt(pulls, InArena(arena)).status().message()),
              HasSubstr("Open.pull: keys and values lie in a GPU's memory"));
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
