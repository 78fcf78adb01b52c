// The client library by NCCL, on the fake CUDA runtime and the fake library, and a real server:
// what it collects is what it collects inline, to the byte, and others go on whatever goes wrong.
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "client/cpp/nccl_device.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/client_gpu.h"
#include "tests/testing/nccl_test.h"
#include "tests/testing/process.h"
#include "tests/testing/prompt_cases.h"

namespace structkv::testkit {
namespace {

using client::TransportChoice;
using structkv::testing::FakeCuda;
using structkv::testing::FakeHeld;
using ::testing::HasSubstr;

// A GPU of a client whose host has that name.
std::shared_ptr<client::NcclGpu> NewGpu(const std::string& host, bool impatient = false) {
  auto device =
      client::internal::NcclDevice::Start(nccl::testing::FakeApi(), nccl::testing::FakeDeviceApi(),
                                          NcclWorkerOptions(impatient), host, absl::Seconds(10));
  EXPECT_TRUE(device.ok()) << device.status();
  return std::make_shared<client::NcclGpu>(*std::move(device));
}

class ClientNcclTest : public NcclTest {
 protected:
  void StartServer(const ServerOptions& options = Options()) {
    StartNccl(options);
    client_ = *client::Client::Connect(target());
    held_ = FakeCuda::held();
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
  std::string Inline(const PromptData& data) {
    const auto compressed = CompressInline(*client_, data);
    EXPECT_TRUE(compressed.ok()) << compressed.status();
    return Text(*compressed);
  }
  void ExpectSame(const PromptData& data, const std::shared_ptr<client::Arena>& arena,
                  const client::SessionOptions& options, const std::string& transport = "nccl") {
    const std::string expected = Inline(data);
    const auto got = CompressFromGpu(*client_, data, arena, options);
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_EQ(got->summary.transport(), transport);
    EXPECT_TRUE(TextOf(*got, *arena->region()) == expected);
  }

  std::unique_ptr<client::Client> client_;
  std::shared_ptr<client::NcclGpu> gpu_ = NewGpu("client");
  FakeHeld held_;
  int comms_ = 0;
};

TEST_F(ClientNcclTest, CollectsWhatMessagesGiveOfPromptsOfEveryKind) {
  StartServer();
  for (const char* name : {"StructKv", "StructKvPerKvHead", "StructKvLatent", "StructKvFp8",
                           "StructKvPaged", "StructKvPlan", "StructKvKeepsAll"}) {
    SCOPED_TRACE(name);
    const PromptData data(FindCase(name).open, 41);
    const auto arena = GpuArena(GpuOptions());
    ExpectSame(data, arena, ByNccl(arena));
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
  ExpectSame(data, arena, options);
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
  v1::Open open = SmallOpen(400);
  open.mutable_geometry()->set_layer_count(8);
  v1::StructKvMethod* method = open.mutable_method()->mutable_structkv();
  method->mutable_pivot()->set_mode(v1::PIVOT_MODE_FIXED);
  method->mutable_pivot()->set_fixed_layer(3);
  const auto arena = GpuArena(GpuOptions());
  std::string texts[2];
  for (const bool by_nccl : {false, true}) {
    PromptData data(open, 53);
    client::SessionOptions options = by_nccl ? ByNccl(arena) : client::SessionOptions();
    options.on_event = [&](const client::Event& event) {
      const auto* layer = std::get_if<client::LayerResult>(&event);
      if (layer != nullptr) texts[by_nccl] += Text(ToHost(*layer, *arena->region()));
    };
    const auto source = [&](uint32_t layer, const client::PivotResult* pivot) {
      if (pivot != nullptr && layer >= *pivot->skeleton_from_layer) {
        data.KeepRows(layer, pivot->skeleton);
      }
      return by_nccl ? GpuLayer(arena.get(), data, layer)
                     : absl::StatusOr<client::LayerTensors>(TensorsOf(data, layer));
    };
    const auto summary = client::StreamPromptInSteps(*client_, open, source, options);
    ASSERT_TRUE(summary.ok()) << summary.status();
    EXPECT_EQ(summary->transport(), by_nccl ? "nccl" : "inline");
  }
  EXPECT_FALSE(texts[0].empty());
  EXPECT_TRUE(texts[1] == texts[0]);
}

TEST_F(ClientNcclTest, PromptsOfABatchShareThePair) {
  StartServer();
  const auto arena = GpuArena(GpuOptions());
  std::vector<PromptData> prompts;
  for (const uint32_t tokens : {300, 70, 411}) prompts.emplace_back(SmallOpen(tokens), tokens);
  std::vector<std::map<uint32_t, std::string>> texts(prompts.size());  // by layer
  std::vector<client::BatchPrompt> batch;
  client::SessionOptions options = ByNccl(arena);
  for (size_t i = 0; i < prompts.size(); ++i) {
    options.on_event = [&, i](const client::Event& event) {
      const auto* layer = std::get_if<client::LayerResult>(&event);
      if (layer != nullptr) texts[i][layer->layer] = Text(ToHost(*layer, *arena->region()));
    };
    batch.push_back({prompts[i].open(), options});
  }
  const auto summaries = client::StreamBatch(
      *client_, batch,
      [&](size_t i, uint32_t layer) { return GpuLayer(arena.get(), prompts[i], layer); }, options);
  for (size_t i = 0; i < prompts.size(); ++i) {
    ASSERT_TRUE(summaries[i].ok()) << summaries[i].status();
    EXPECT_EQ(summaries[i]->transport(), "nccl");
    const auto whole = CompressInline(*client_, prompts[i]);
    ASSERT_TRUE(whole.ok()) << whole.status();
    for (const auto& layer : whole->layers) EXPECT_TRUE(texts[i][layer.layer] == Text(layer));
  }
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
  ExpectSame(data, arena, ByNccl(arena));
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
    ExpectSame(data, arena, options);
    // Where it may be tried again nobody notices, unless a result came first.
    client_ = *client::Client::Connect(target());
  }
  ExpectNeighboursUndisturbed();
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
  options = ByNccl(arena);
  options.nccl = nullptr;
  EXPECT_EQ(refused(options), "NCCL: no GPU was given (StreamOptions.nccl)");
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
  client_ = *client::Client::Connect(target());
  held_ = FakeCuda::held();
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
  ExpectSame(data, arena, options, "inline");
}

}  // namespace
}  // namespace structkv::testkit
