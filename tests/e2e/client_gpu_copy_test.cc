// When memory of a GPU is read and written: behind what was recorded, in a region or on its way to
// and from the host.
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/fake_server.h"
#include "tests/e2e/client_cuda_ipc.h"
#include "tests/testing/cutting_proxy.h"

namespace structkv::testkit {
namespace {

using client::TransportChoice;
using structkv::testing::FakeCuda;
using ::testing::HasSubstr;

// What lies behind a record is there for who reads, whatever is recorded after it, and the streams
// do not wait for each other.
TEST_F(ClientCudaIpcTest, RecordsOfSeveralStreamsAddUp) {
  StartOnGpus(Options());
  const FakeStream streams[2];
  bool has_run[2] = {};
  for (const int i : {0, 1}) {
    EXPECT_EQ(FakeCuda::Launch(streams[i].get(), [&, i] { has_run[i] = true; }), cudaSuccess);
  }
  const auto arena = GpuArena(GpuOptions());
  EXPECT_TRUE(arena->region()->Record(streams[0].get()).ok());
  EXPECT_TRUE(arena->region()->Record(streams[1].get()).ok());
  EXPECT_EQ(cudaStreamSynchronize(streams[1].get()), cudaSuccess);
  EXPECT_TRUE(has_run[1] && !has_run[0]);
  std::byte got{};
  EXPECT_TRUE(arena->region()->Read(0, absl::MakeSpan(&got, 1)).ok());
  EXPECT_TRUE(has_run[0]);
}

// Two sessions share a region, each with a stream of its own: no layer is read before it is there.
TEST_F(ClientCudaIpcTest, SessionsOnSeveralStreamsShareARegion) {
  StartOnGpus(Options());
  const FakeStream streams[2];
  const auto arena = GpuArena(GpuOptions());
  const PromptData data(SmallOpen(), 5);
  std::vector<std::unique_ptr<client::CompressSession>> sessions;
  for (int i = 0; i < 2; ++i) {
    auto session = client_->OpenPrompt(data.open(), InArena(arena));
    ASSERT_TRUE(session.ok()) << session.status();
    sessions.push_back(*std::move(session));
  }
  for (uint32_t layer = 0; layer < data.layers(); ++layer) {
    client::LayerTensors tensors[2];
    for (const int i : {0, 1}) {
      tensors[i] = *GpuLayer(arena.get(), data, layer);
      // The queries follow, so that the layer is computed when both have recorded.
      tensors[i].window_queries = {};
    }
    for (const int i : {0, 1}) {
      WriteLate(tensors[i].keys, streams[i].get());
      WriteLate(tensors[i].values, streams[i].get());
    }
    for (const int i : {0, 1}) {
      tensors[i].cuda_stream = streams[i].get();
      ASSERT_TRUE(sessions[i]->SendLayer(layer, tensors[i]).ok());
    }
    for (const int i : {0, 1}) {
      const auto& queries = TensorsOf(data, layer).window_queries;
      ASSERT_TRUE(sessions[i]->Send(layer, v1::TENSOR_WINDOW_QUERIES, queries, 0, nullptr).ok());
    }
  }
  const std::string expected = Inline(data);
  for (const auto& session : sessions) {
    ASSERT_TRUE(session->Commit().ok());
    const auto got = session->Collect();
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_TRUE(TextOf(*got, *arena->region()) == expected);
  }
}

// Keys and values of the second region, recorded there alone, are copied from it.
TEST_F(ClientCudaIpcTest, CopiesBehindTheRecordOfTheirOwnRegion) {
  StartOnGpus(Options());
  const FakeStream stream;
  const auto first = GpuArena(GpuOptions());
  const auto second = GpuArena(GpuOptions());
  const PromptData data(SmallOpen(), 5);
  client::SessionOptions options;
  options.regions = {first->region(), second->region()};
  options.copy_from_gpu = true;
  options.transport = TransportChoice::kInline;
  const auto got = client::CompressPrompt(
      *client_, data.open(),
      [&](uint32_t layer) {
        auto tensors = GpuLayer(second.get(), data, layer);
        if (!tensors.ok()) return tensors;
        WriteLate(tensors->keys, stream.get());
        WriteLate(tensors->values, stream.get());
        EXPECT_TRUE(second->region()->Record(stream.get()).ok());
        return tensors;
      },
      options);
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_TRUE(Text(*got) == Inline(data));
}

// A server that keeps all of a prompt that is to be thinned, for results which are copied.
TEST_F(ClientCudaIpcTest, MoreRowsThanTheResultsHaveRoomForAreNotCopied) {
  StartOnGpus(Options());
  constexpr size_t kTokens = 20;
  constexpr size_t kRowBytes = 16;
  client::FakeServer generous([](int, grpc::ServerContext*, client::Stream* stream) {
    client::Received received;
    client::ReadOpen(stream, &received);
    v1::Opened opened = client::OpenedFor(received.open);
    for (uint32_t& kept : *opened.mutable_kept_tokens()) kept = kTokens;
    client::SendOpened(stream, opened);
    client::ReadToCommit(stream, &received);
    v1::CompressResponse response = client::LayerResponse(received.open, 0);
    response.mutable_layer()->set_kept_tokens(kTokens);
    for (v1::TensorPiece& piece : *response.mutable_layer()->mutable_pieces()) {
      std::vector<int32_t> positions(kTokens);
      std::iota(positions.begin(), positions.end(), 0);
      piece.set_data(piece.tensor() == v1::TENSOR_POSITIONS
                         ? std::string(reinterpret_cast<const char*>(positions.data()), 4 * kTokens)
                         : client::TestTensor(0, piece.tensor(), kRowBytes * kTokens));
    }
    stream->Write(response);
    return grpc::Status::OK;
  });
  v1::Open open = client::SmallOpen();
  open.set_prompt_tokens(kTokens);
  open.mutable_method()->mutable_snapkv()->set_window_tokens(2);
  open.mutable_method()->mutable_snapkv()->mutable_kv_budget()->set_ratio(0.1);
  const auto arena = GpuArena(GpuOptions());
  client::SessionOptions options = InArena(arena);
  options.transport = TransportChoice::kInline;
  options.copy_from_gpu = true;
  const std::string rows(kRowBytes * kTokens, 'r');
  const std::string queries(64, 'q');
  const auto refused = client::CompressPrompt(
      *client::ClientOf(generous), open,
      [&](uint32_t) -> absl::StatusOr<client::LayerTensors> {
        return client::LayerTensors{
            .keys = AsBytes(rows), .values = AsBytes(rows), .window_queries = AsBytes(queries)};
      },
      options);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kDataLoss) << refused.status();
  EXPECT_THAT(std::string(refused.status().message()),
              HasSubstr("Opened.kept_tokens need 1280 bytes, and what Open lets layers keep 512"));
}

class ClientGpuFetchTest : public ClientCudaIpcTest {
 protected:
  ServerOptions HoldingOptions() {
    ServerOptions options = Options();
    options.sessions.hold.budget_bytes = int64_t{64} << 20;
    return options;
  }
  // Has the server hold a cache; its handle.
  std::string Hold() {
    v1::Open open = SmallOpen(4096);
    open.mutable_method()->mutable_full();
    const PromptData data(open, 21);
    open.set_output(v1::OUTPUT_HOLD);
    const auto held = client::CompressPrompt(
        *client_, open, [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
          return TensorsOf(data, layer);
        });
    EXPECT_TRUE(held.ok()) << held.status();
    return held.ok() ? held->summary.held().handle() : "";
  }
};

// A held cache is fetched into a GPU's memory, also over a connection that breaks.
TEST_F(ClientGpuFetchTest, HeldCachesAreFetchedIntoIt) {
  StartOnGpus(HoldingOptions());
  const std::string handle = Hold();
  const auto expected = client_->FetchCache(handle);
  ASSERT_TRUE(expected.ok()) << expected.status();
  client::FetchOptions into;
  into.retry.initial_backoff = absl::Milliseconds(1);
  for (const bool breaks : {false, true}) {
    CuttingProxy proxy(server().port(), {breaks ? size_t{9'000} : size_t{1'000'000}});
    const auto client = NewClient(proxy.target());
    const auto arena = GpuArena(GpuOptions(0, size_t{16} << 20));
    into.results = arena;
    {
      const auto fetched = client->FetchCache(handle, into);
      ASSERT_TRUE(fetched.ok()) << fetched.status();
      EXPECT_EQ(fetched->attempts > 1, breaks);
      EXPECT_EQ(fetched->info.transport(), v1::TRANSPORT_CUDA_IPC);
      ASSERT_EQ(fetched->layers.size(), expected->layers.size());
      for (size_t i = 0; i < fetched->layers.size(); ++i) {
        EXPECT_TRUE(arena->region()->OffsetOf(fetched->layers[i].keys.span()).has_value());
        EXPECT_TRUE(Text(ToHost(fetched->layers[i], *arena->region())) ==
                    Text(expected->layers[i]));
      }
    }
    EXPECT_TRUE(Eventually([&] { return arena->free_bytes() == arena->region()->size(); }));
    into.results = nullptr;
  }
  EXPECT_TRUE(client_->ReleaseCache(handle).ok());
}

TEST_F(ClientGpuFetchTest, HeldCachesOfAServerOnTheCpuAreNot) {
  StartOnCpu(HoldingOptions());
  const std::string handle = Hold();
  client::FetchOptions into;
  into.results = GpuArena(GpuOptions());
  const absl::Status refused = client_->FetchCache(handle, into).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << refused;
  EXPECT_THAT(std::string(refused.message()), HasSubstr("FetchOptions.results is memory of a GPU"));
  EXPECT_TRUE(client_->ReleaseCache(handle).ok());
}

}  // namespace
}  // namespace structkv::testkit
