// Held caches that the client library receives into memory of a GPU by NCCL, on the fake CUDA
// runtime and the fake library, from a real server: what comes in messages, to the byte.
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "client/cpp/nccl_device.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/client_gpu.h"
#include "tests/e2e/held_test.h"
#include "tests/e2e/held_ways.h"
#include "tests/testing/cutting_proxy.h"
#include "tests/testing/nccl_test.h"
#include "tests/testing/process.h"

namespace structkv::testkit {
namespace {

using client::FetchedCache;
using client::TransportChoice;
using structkv::testing::FakeCuda;
using structkv::testing::FakeHeld;
using ::testing::HasSubstr;

constexpr size_t kArenaBytes = size_t{8} << 20;

std::shared_ptr<client::NcclGpu> NewGpu(bool impatient = false) {
  auto device = client::internal::NcclDevice::Start(
      nccl::testing::FakeApi(), nccl::testing::FakeDeviceApi(), NcclWorkerOptions(impatient),
      "decoder", absl::Seconds(10));
  EXPECT_TRUE(device.ok()) << device.status();
  return std::make_shared<client::NcclGpu>(*std::move(device));
}

// Everything that a caller keeps, with what lies in the region copied to the host.
std::string RowsOf(const std::vector<client::LayerResult>& layers, const client::Region& region) {
  std::string text;
  for (const client::LayerResult& each : layers) {
    const client::LayerResult layer = ToHost(each, region);
    text += std::to_string(layer.layer) + AsText(layer.positions) + AsText(layer.keys) +
            AsText(layer.values) + AsText(layer.key_scales) + AsText(layer.value_scales);
  }
  return text;
}

class ClientNcclFetchTest : public HoldingTest<NcclTest> {
 protected:
  void StartServer(const ServerOptions& options = Options()) {
    StartNccl(options);
    Connect();
  }
  void Connect() {
    client::ClientOptions options;
    options.own_process = true;  // the server is the test's own
    client_ = *client::Client::Connect(target(), options);
    held_ = FakeCuda::held();
  }
  void TearDown() override {
    EXPECT_TRUE(Eventually([&] { return held_bytes() == 0; }));
    client_ = nullptr;
    gpu_ = nullptr;
    EXPECT_TRUE(Eventually([&] { return FakeCuda::held() == held_; }));
  }

  std::string HandleOf(const PromptData& data) { return Hold(data).summary->held().handle(); }
  // A cache of long layers.
  std::string HoldLong() {
    v1::Open open = WideOpen(1500);
    open.mutable_method()->mutable_full();
    return HandleOf(PromptData(open, 21));
  }
  client::FetchOptions ByNccl(const std::shared_ptr<client::Arena>& arena) {
    client::FetchOptions options;
    options.results = arena;
    options.transport = TransportChoice::kNccl;
    options.nccl = gpu_;
    options.retry.initial_backoff = absl::Milliseconds(1);
    return options;
  }
  std::string InMessages(const std::string& handle, client::FetchOptions options) {
    const std::shared_ptr<client::Arena> arena = std::move(options.results);
    options.results = nullptr;
    options.nccl = nullptr;
    options.transport = TransportChoice::kInline;
    options.on_info = nullptr;
    const auto fetched = client_->FetchCache(handle, options);
    EXPECT_TRUE(fetched.ok()) << fetched.status();
    return fetched.ok() ? RowsOf(fetched->layers, *arena->region()) : "";
  }
  // That a fetch brings what messages bring, into the arena, by `transport`.
  void ExpectSame(const std::string& handle, const client::FetchOptions& options,
                  v1::Transport transport = v1::TRANSPORT_NCCL) {
    const std::string expected = InMessages(handle, options);
    ExpectIs(client_->FetchCache(handle, options), expected, *options.results, transport);
  }
  static void ExpectIs(const absl::StatusOr<FetchedCache>& fetched, const std::string& expected,
                       const client::Arena& arena, v1::Transport transport = v1::TRANSPORT_NCCL) {
    ASSERT_TRUE(fetched.ok()) << fetched.status();
    EXPECT_EQ(fetched->info.transport(), transport) << fetched->info.transport_reason();
    EXPECT_TRUE(RowsOf(fetched->layers, *arena.region()) == expected);
    for (const client::LayerResult& layer : fetched->layers) {
      for (const client::Bytes* rows : {&layer.keys, &layer.values}) {
        EXPECT_TRUE(rows->empty() || arena.region()->OffsetOf(rows->span()).has_value());
      }
    }
  }
  static bool IsFree(const client::Arena& arena) {
    return Eventually([&] { return arena.free_bytes() == arena.region()->size(); });
  }
  void ReleaseIt(const std::string& handle) { EXPECT_TRUE(client_->ReleaseCache(handle).ok()); }

  std::unique_ptr<client::Client> client_;
  std::shared_ptr<client::NcclGpu> gpu_ = NewGpu();
  FakeHeld held_;
};

TEST_F(ClientNcclFetchTest, FetchesCachesOfEveryKind) {
  StartServer();
  const auto arena = GpuArena(GpuOptions(0, kArenaBytes));
  for (const Way& way : Ways()) {
    for (const uint32_t block : {0U, 16U}) {
      SCOPED_TRACE(way.name + std::to_string(block));
      const v1::Open open = HeldOpen({way, v1::LAYOUT_TOKEN_HEAD_DIM, block});
      const std::string handle = HandleOf(PromptData(open, 31));
      client::FetchOptions options = ByNccl(arena);
      ExpectSame(handle, options);
      options.first_layer = 1;
      options.layer_count = 1;
      options.first_kv_head = open.geometry().kv_head_count() - 1;
      ExpectSame(handle, options);
      ReleaseIt(handle);
    }
  }
  EXPECT_TRUE(IsFree(*arena));
}

TEST_F(ClientNcclFetchTest, AutoTakesItWhereThereIsNoCudaIpc) {
  StartServer();
  const std::string handle = HandleOf(PromptData(WideOpen(), 5));
  const auto arena = GpuArena(GpuOptions(0, kArenaBytes));
  client::FetchOptions options = ByNccl(arena);
  options.transport = TransportChoice::kAuto;
  std::vector<uint32_t> layers;
  options.on_info = [](const v1::CacheInfo& info) {
    EXPECT_THAT(info.transport_reason(), HasSubstr("the server has no CUDA IPC"));
  };
  ExpectSame(handle, options);
  options.on_layer = [&](const client::LayerResult& layer) { layers.push_back(layer.layer); };
  EXPECT_TRUE(client_->FetchCache(handle, options).ok());
  EXPECT_THAT(layers, ::testing::ElementsAre(0, 1, 2, 3));
  ReleaseIt(handle);
}

TEST_F(ClientNcclFetchTest, AutoTakesCudaIpcWhereThatIsGranted) {
  const TemporaryDirectory directory;
  ServerOptions options = Options();
  options.regions.socket.path = directory.Path("regions");
  StartServer(options);
  const std::string handle = HandleOf(PromptData(WideOpen(), 5));
  {
    const auto arena = GpuArena(GpuOptions(0, kArenaBytes));
    client::FetchOptions fetch = ByNccl(arena);
    fetch.transport = TransportChoice::kAuto;
    ExpectSame(handle, fetch, v1::TRANSPORT_CUDA_IPC);
    ExpectSame(handle, ByNccl(arena));
  }
  ReleaseIt(handle);
}

TEST_F(ClientNcclFetchTest, ABrokenConnectionIsGoneOnWith) {
  StartServer();
  const std::string handle = HoldLong();
  const auto arena = GpuArena(GpuOptions(0, kArenaBytes));
  client::FetchOptions options = ByNccl(arena);
  options.kv_head_count = 3;
  const std::string expected = InMessages(handle, options);
  {
    // The pair's control stream breaks with it.
    CuttingProxy proxy(server().port(), {15'000, 35'000});
    const auto client = *client::Client::Connect(proxy.target());
    std::vector<uint32_t> layers;
    std::vector<client::LayerResult> results;
    options.on_layer = [&](client::LayerResult layer) {
      layers.push_back(layer.layer);
      results.push_back(std::move(layer));
    };
    const auto fetched = client->FetchCache(handle, options);
    ASSERT_TRUE(fetched.ok()) << fetched.status();
    EXPECT_GE(fetched->attempts, 2);
    EXPECT_EQ(fetched->info.transport(), v1::TRANSPORT_NCCL);
    EXPECT_THAT(layers, ::testing::ElementsAre(0, 1, 2, 3));
    EXPECT_TRUE(RowsOf(results, *arena->region()) == expected);
  }
  EXPECT_TRUE(IsFree(*arena));
  ReleaseIt(handle);
}

// The communicator fails in the middle: the fetch goes on by another pair, or fails.
TEST_F(ClientNcclFetchTest, APairThatFailsIsAttachedAgain) {
  StartServer(Options(/*impatient=*/true));
  gpu_ = NewGpu(/*impatient=*/true);
  StartNeighbours();
  const std::string handle = HoldLong();
  const auto arena = GpuArena(GpuOptions(0, kArenaBytes));
  const std::string expected = InMessages(handle, ByNccl(arena));
  for (const char* fault : {"async_error@1", "hang@1", "async_error@0"}) {
    SCOPED_TRACE(fault);
    client_ = *client::Client::Connect(target());
    nccl::testing::FaultNext(fault);
    client::FetchOptions options = ByNccl(arena);
    options.retry.max_attempts = 1;
    const auto failed = client_->FetchCache(handle, options);
    EXPECT_EQ(failed.status().code(), absl::StatusCode::kUnavailable) << failed.status();
    EXPECT_TRUE(IsFree(*arena));
    client_ = *client::Client::Connect(target());
    nccl::testing::FaultNext(fault);
    const auto fetched = client_->FetchCache(handle, ByNccl(arena));
    ExpectIs(fetched, expected, *arena);
    EXPECT_EQ(fetched->attempts, 2);
  }
  nccl::testing::FaultNext("");
  ReleaseIt(handle);
  ExpectNeighboursUndisturbed();
}

// The pair ended while nothing was fetched.
TEST_F(ClientNcclFetchTest, APairThatHasEndedIsAttachedAgain) {
  StartServer();
  const std::string handle = HandleOf(PromptData(WideOpen(), 5));
  const auto arena = GpuArena(GpuOptions(0, kArenaBytes));
  const std::string expected = InMessages(handle, ByNccl(arena));
  CuttingProxy proxy(server().port(), {60'000});
  const auto client = *client::Client::Connect(proxy.target());
  for (int i = 0; i < 4; ++i) {
    SCOPED_TRACE(i);
    // What is not by NCCL breaks the connection, and nobody tells the pair.
    client::FetchOptions in_messages;
    in_messages.retry.initial_backoff = absl::Milliseconds(1);
    EXPECT_TRUE(client->FetchCache(handle, in_messages).ok());
    ExpectIs(client->FetchCache(handle, ByNccl(arena)), expected, *arena);
  }
  EXPECT_GE(proxy.connections(), 2);
  ReleaseIt(handle);
}

TEST_F(ClientNcclFetchTest, ItsTimeEnds) {
  StartServer();
  const std::string handle = HoldLong();
  const auto arena = GpuArena(GpuOptions(0, kArenaBytes));
  nccl::testing::FaultNext("hang@1");
  client::FetchOptions options = ByNccl(arena);
  options.timeout = absl::Seconds(3);
  const auto failed = client_->FetchCache(handle, options);
  EXPECT_EQ(failed.status().code(), absl::StatusCode::kDeadlineExceeded) << failed.status();
  // The transfer that hangs ends with its pair.
  gpu_ = nullptr;
  client_ = *client::Client::Connect(target());
  EXPECT_TRUE(IsFree(*arena));
  gpu_ = NewGpu();
  ExpectSame(handle, ByNccl(arena));
  ReleaseIt(handle);
}

TEST_F(ClientNcclFetchTest, SeveralAtOnceByOnePair) {
  StartServer();
  const std::string handle = HandleOf(PromptData(WideOpen(), 5));
  const auto arena = GpuArena(GpuOptions(0, kArenaBytes));
  const std::string expected = InMessages(handle, ByNccl(arena));
  const int comms = nccl::testing::LiveComms();
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back(
        [&] { ExpectIs(client_->FetchCache(handle, ByNccl(arena)), expected, *arena); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(nccl::testing::LiveComms(), comms + 2);
  ReleaseIt(handle);
}

TEST_F(ClientNcclFetchTest, WhatCannotBeHadIsSaid) {
  StartServer();
  const std::string handle = HandleOf(PromptData(WideOpen(), 5));
  const auto arena = GpuArena(GpuOptions(0, kArenaBytes));
  const auto refused = [&](const client::FetchOptions& options, absl::StatusCode code) {
    const absl::Status status = client_->FetchCache(handle, options).status();
    EXPECT_EQ(status.code(), code) << status;
    return std::string(status.message());
  };
  client::FetchOptions options = ByNccl(arena);
  options.nccl = nullptr;
  EXPECT_EQ(refused(options, absl::StatusCode::kInvalidArgument),
            "NCCL: no GPU was given (FetchOptions.nccl)");
  options = ByNccl(nullptr);
  EXPECT_EQ(refused(options, absl::StatusCode::kInvalidArgument),
            "NCCL: no region was given (FetchOptions.results)");
  options =
      ByNccl(std::make_shared<client::Arena>(*client::Region::Create({.size_bytes = kArenaBytes})));
  EXPECT_EQ(refused(options, absl::StatusCode::kInvalidArgument),
            "NCCL: the regions are memory of the host");
  {
    const auto rest = arena->Allocate(kArenaBytes - 4096);
    EXPECT_THAT(refused(ByNccl(arena), absl::StatusCode::kResourceExhausted),
                HasSubstr("FetchOptions.results: "));
  }
  options = ByNccl(arena);
  options.first_layer = 7;
  EXPECT_THAT(refused(options, absl::StatusCode::kInvalidArgument), HasSubstr("first_layer is 7"));
  ReleaseIt(handle);
  EXPECT_THAT(refused(ByNccl(arena), absl::StatusCode::kNotFound), HasSubstr("no such cache"));
}

TEST_F(ClientNcclFetchTest, AServerWithoutIt) {
  ServerOptions without = Options();
  without.nccl.library = "libno-such-nccl.so.2";
  StartAlone(without, structkv::testing::MakeFakeBackend());
  Connect();
  const std::string handle = HandleOf(PromptData(WideOpen(), 5));
  const auto arena = GpuArena(GpuOptions(0, kArenaBytes));
  const absl::Status named = client_->FetchCache(handle, ByNccl(arena)).status();
  EXPECT_EQ(named.code(), absl::StatusCode::kUnimplemented) << named;
  EXPECT_THAT(std::string(named.message()), HasSubstr("no NCCL: libno-such-nccl.so.2"));
  client::FetchOptions options = ByNccl(arena);
  options.transport = TransportChoice::kAuto;
  const absl::Status refused = client_->FetchCache(handle, options).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << refused;
  EXPECT_THAT(std::string(refused.message()), HasSubstr("no transport can write there"));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("nccl: the server has no NCCL"));
  ReleaseIt(handle);
}

}  // namespace
}  // namespace structkv::testkit
