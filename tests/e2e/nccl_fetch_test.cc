// Held caches that another GPU receives by NCCL, on the fake library and the fake CUDA runtime:
// what comes in messages, to the byte.
#include "tests/testing/nccl_fetch.h"

#include <cstdio>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/held_test.h"
#include "tests/e2e/held_ways.h"
#include "tests/testing/nccl_test.h"

namespace structkv::testkit {
namespace {

using ::testing::HasSubstr;

class NcclFetchTest : public HoldingTest<NcclTest> {
 protected:
  void TearDown() override {
    EXPECT_TRUE(Eventually([&] { return held_bytes() == 0; }));
  }

  std::string HandleOf(const PromptData& data, const Metadata& metadata = {}) {
    return Hold(data, metadata).summary->held().handle();
  }
  void ReleaseIt(const std::string& handle) { EXPECT_TRUE(Release(channel(), handle).ok()); }
  static void ExpectByNccl(const Fetched& fetched, const std::string& expected) {
    EXPECT_TRUE(fetched.status.ok()) << fetched.status.error_message();
    EXPECT_THAT(fetched.faults, ::testing::IsEmpty());
    EXPECT_TRUE(fetched.bytes == expected);
    ASSERT_TRUE(fetched.info.has_value() && fetched.summary.has_value());
    EXPECT_EQ(fetched.info->transport(), v1::TRANSPORT_NCCL);
    EXPECT_EQ(fetched.info->transport_reason(), "");
    EXPECT_EQ(fetched.summary->transport(), "nccl");
  }
};

class NcclFetchWaysTest : public NcclFetchTest, public ::testing::WithParamInterface<HeldParam> {};

TEST_P(NcclFetchWaysTest, BringsWhatMessagesBring) {
  StartNccl();
  const v1::Open open = HeldOpen(GetParam());
  const std::string handle = HandleOf(PromptData(open, 31));
  NcclClient client(channel(), "client");
  const uint32_t heads = open.geometry().kv_head_count();
  v1::FetchCacheRequest request = FetchRequest(handle);
  ExpectByNccl(FetchByPair(channel(), &client, request), Fetch(channel(), request).bytes);
  request.set_first_layer(1);
  request.set_layer_count(2);
  for (const uint32_t first : {0U, heads / 2}) {
    SCOPED_TRACE(first);
    request.set_first_kv_head(first);
    request.set_kv_head_count((heads + 1) / 2);
    ExpectByNccl(FetchByPair(channel(), &client, request), Fetch(channel(), request).bytes);
  }
  ReleaseIt(handle);
}

INSTANTIATE_TEST_SUITE_P(, NcclFetchWaysTest, HeldGrid(), HeldName);

TEST_F(NcclFetchTest, RowsTravelByTransfersUnderKeysOfTheirOwn) {
  StartNccl();
  const std::string handle = HandleOf(PromptData(WideOpen(), 3));
  const std::string expected = Fetch(channel(), FetchRequest(handle)).bytes;
  NcclClient client(channel(), "client");
  std::set<std::string> keys;
  uint32_t layers = 0;
  for (int i = 0; i < 2; ++i) {
    NcclFetch fetch(channel(), &client, FetchRequest(handle));
    while (const v1::FetchCacheResponse* response = fetch.ReadOne()) {
      layers += response->layer().complete() ? 1 : 0;
      for (const v1::TensorPiece& piece : response->layer().pieces()) {
        const bool rows = piece.tensor() == v1::TENSOR_KEYS || piece.tensor() == v1::TENSOR_VALUES;
        EXPECT_EQ(piece.has_transfer(), rows);
        if (rows) keys.insert(piece.transfer().key());
      }
      fetch.TakeRows();
    }
    ExpectByNccl(fetch.Finish(), expected);
  }
  EXPECT_EQ(keys.size(), layers);
  EXPECT_EQ(layers, 8U);
  ReleaseIt(handle);
}

// From every kind of place: within positions, keys, values and scales, at their ends, behind all.
TEST_F(NcclFetchTest, GoesOnWhereItWas) {
  StartNccl();
  v1::Open open = WideOpen();
  open.set_dtype(v1::DTYPE_F8_E4M3);
  open.set_kv_scales(v1::KV_SCALES_PER_KV_HEAD);
  open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
  const std::string handle = HandleOf(PromptData(open, 9));
  v1::FetchCacheRequest request = FetchRequest(handle);
  request.set_first_kv_head(1);
  request.set_kv_head_count(2);
  const Fetched whole = Fetch(channel(), request);
  std::vector<size_t> places = {0, 1, whole.bytes.size()};
  size_t at = 0;
  for (const auto& [layer, answer] : whole.layers) {
    if (layer > 1) break;
    for (const v1::Tensor tensor : {v1::TENSOR_POSITIONS, v1::TENSOR_KEYS, v1::TENSOR_VALUES,
                                    v1::TENSOR_KEY_SCALES, v1::TENSOR_VALUE_SCALES}) {
      const size_t size = answer.tensors.at(tensor).size();
      places.insert(places.end(), {at + 4, at + size / 2, at + size});
      at += size;
    }
  }
  NcclClient client(channel(), "client");
  for (const size_t place : places) {
    SCOPED_TRACE(place);
    request.set_skip_bytes(place);
    ExpectByNccl(FetchByPair(channel(), &client, request), whole.bytes.substr(place));
  }
  ReleaseIt(handle);
}

// Layers that are many messages and many groups.
TEST_F(NcclFetchTest, OfLongLayers) {
  StartNccl();
  v1::Open open = WideOpen(3000);
  open.set_layout(v1::LAYOUT_TOKEN_HEAD_DIM);
  open.mutable_method()->mutable_full();
  const std::string handle = HandleOf(PromptData(open, 5));
  NcclClient client(channel(), "client");
  v1::FetchCacheRequest request = FetchRequest(handle);
  request.set_first_kv_head(1);
  request.set_max_response_message_bytes(64 << 10);
  const Fetched expected = Fetch(channel(), request);
  EXPECT_GT(expected.bytes.size() / expected.layers.size(), size_t{1} << 20);
  const Fetched fetched = FetchByPair(channel(), &client, request);
  ExpectByNccl(fetched, expected.bytes);
  ReleaseIt(handle);
}

TEST_F(NcclFetchTest, SeveralOfAPairAndOfOthersBesidePrompts) {
  StartNccl();
  const PromptData data(SmallOpen(), 3);
  const std::string compressed = Inline(data);
  const std::string handle = HandleOf(PromptData(WideOpen(), 3));
  const std::string expected = Fetch(channel(), FetchRequest(handle)).bytes;
  NcclClient shared(channel(), "shared");
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&, i] {
      const auto own = NewChannel(target());
      std::unique_ptr<NcclClient> client;
      if (i >= 3) client = std::make_unique<NcclClient>(own, "host" + std::to_string(i));
      NcclClient* const pair = client == nullptr ? &shared : client.get();
      if (i % 3 == 2) {
        NcclPrompt prompt(data, pair);
        ExpectResult(prompt.Run(own), compressed);
      } else {
        ExpectByNccl(FetchByPair(own, pair, FetchRequest(handle)), expected);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  ReleaseIt(handle);
}

TEST_F(NcclFetchTest, OfEachOfTwoGpus) {
  structkv::testing::FakeCuda::Reset({.count = 2});
  StartNccl();
  const std::string handle = HandleOf(PromptData(WideOpen(), 3));
  const std::string expected = Fetch(channel(), FetchRequest(handle)).bytes;
  const Backend& backend = server().sessions().backend();
  const auto all_free = [&backend](int gpu) {
    return backend.Reserve(gpu, backend.reservable_bytes(gpu)).ok();
  };
  NcclClient first(channel(), "first");
  NcclClient second(NewChannel(target()), "second");
  for (const int gpu : {0, 1}) {
    NcclClient* const client = gpu == 0 ? &first : &second;
    NcclFetch fetch(channel(), client, FetchRequest(handle));
    ASSERT_NE(fetch.ReadOne(), nullptr);
    EXPECT_FALSE(all_free(gpu));
    EXPECT_TRUE(all_free(1 - gpu));
    ExpectByNccl(fetch.Finish(), expected);
    EXPECT_TRUE(Eventually([&] { return all_free(gpu); }));
  }
  ReleaseIt(handle);
}

TEST_F(NcclFetchTest, PairsAndHandlesAreOfTheirTenants) {
  StartNccl();
  const Metadata somebody = {{"structkv-tenant", "somebody"}};
  const std::string own = HandleOf(PromptData(WideOpen(), 3));
  const std::string others = HandleOf(PromptData(WideOpen(), 4), somebody);
  NcclClient client(channel(), "client");
  NcclClient stranger(channel(), "stranger", "somebody");
  const auto fails = [&](NcclClient* by, const std::string& handle, const Metadata& metadata,
                         const std::string& text) {
    ExpectFetchFailure(FetchByPair(channel(), by, FetchRequest(handle), metadata),
                       grpc::StatusCode::NOT_FOUND, {text});
  };
  fails(&stranger, own, {}, "nccl_pair: NCCL pair ");
  fails(&client, others, somebody, "nccl_pair: NCCL pair ");
  fails(&client, others, {}, "handle: no such cache is held");
  ExpectByNccl(FetchByPair(channel(), &stranger, FetchRequest(others), somebody),
               Fetch(channel(), FetchRequest(others), somebody).bytes);
  ReleaseIt(own);
  EXPECT_TRUE(Release(channel(), others, somebody).ok());
}

TEST_F(NcclFetchTest, WithoutAPairTheNextWishIsTaken) {
  StartNccl();
  const std::string handle = HandleOf(PromptData(WideOpen(), 3));
  v1::FetchCacheRequest request = FetchRequest(handle);
  request.add_transports(v1::TRANSPORT_NCCL);
  ExpectFetchFailure(Fetch(channel(), request), grpc::StatusCode::FAILED_PRECONDITION,
                     {"transports: none can be granted: nccl: nccl_pair names none"});
  request.set_nccl_pair(7);
  ExpectFetchFailure(Fetch(channel(), request), grpc::StatusCode::NOT_FOUND,
                     {"nccl_pair: NCCL pair 7 is not attached"});
  request.clear_nccl_pair();
  request.add_transports(v1::TRANSPORT_INLINE);
  const Fetched fetched = Fetch(channel(), request);
  EXPECT_TRUE(fetched.status.ok());
  EXPECT_EQ(fetched.info->transport(), v1::TRANSPORT_INLINE);
  EXPECT_EQ(fetched.info->transport_reason(), "nccl: nccl_pair names none");
  ReleaseIt(handle);
}

TEST_F(NcclFetchTest, MemoryOfTheGpuThatIsTaken) {
  StartNccl(Options(), int64_t{192} << 10);
  const std::string handle = HandleOf(PromptData(WideOpen(), 3));
  const std::string large = HandleOf(PromptData(WideOpen(2000), 3));
  const std::string expected = Fetch(channel(), FetchRequest(handle)).bytes;
  NcclClient client(channel(), "client");
  std::vector<std::unique_ptr<NcclFetch>> running;
  Fetched refused;
  for (int i = 0; i < 10 && refused.trailers.empty(); ++i) {
    running.push_back(std::make_unique<NcclFetch>(channel(), &client, FetchRequest(handle)));
    if (running.back()->ReadOne() != nullptr) continue;
    refused = running.back()->Finish();
    running.pop_back();
  }
  ASSERT_FALSE(running.empty());
  ExpectFetchFailure(refused, grpc::StatusCode::RESOURCE_EXHAUSTED,
                     {"GPU 0: no device memory to reserve for ", " of 196608 are free"});
  EXPECT_EQ(refused.trailers.at("grpc-retry-pushback-ms"), "1000");
  for (const auto& fetch : running) ExpectByNccl(fetch->Finish(), expected);
  ExpectNothingReserved();
  v1::FetchCacheRequest request = FetchRequest(large);
  ExpectFetchFailure(FetchByPair(channel(), &client, request),
                     grpc::StatusCode::FAILED_PRECONDITION,
                     {"bytes of GPU 0's memory; 196608 are set apart"});
  request.add_transports(v1::TRANSPORT_INLINE);
  const Fetched in_messages = FetchByPair(channel(), &client, request);
  EXPECT_TRUE(in_messages.status.ok());
  EXPECT_THAT(in_messages.info->transport_reason(), HasSubstr("196608 are set apart"));
  ReleaseIt(handle);
  ReleaseIt(large);
}

// One layer needs the room of one, more need that of two.
TEST_F(NcclFetchTest, ReservesForNoMoreLayersThanThereAre) {
  v1::Open open = WideOpen(1000);
  open.mutable_method()->mutable_full();
  const int64_t layer_bytes = int64_t{2} * 4 * 1000 * 32 * 2;
  StartNccl(Options(), layer_bytes + layer_bytes / 2);
  const std::string handle = HandleOf(PromptData(open, 3));
  NcclClient client(channel(), "client");
  v1::FetchCacheRequest request = FetchRequest(handle);
  request.set_first_layer(2);
  request.set_layer_count(1);
  ExpectByNccl(FetchByPair(channel(), &client, request), Fetch(channel(), request).bytes);
  request.set_layer_count(2);
  ExpectFetchFailure(FetchByPair(channel(), &client, request),
                     grpc::StatusCode::FAILED_PRECONDITION, {"are set apart"});
  ReleaseIt(handle);
}

// One that has begun goes on to its end.
TEST_F(NcclFetchTest, TheLeaseEndsUnderIt) {
  StartNccl();
  const std::string handle = HandleOf(PromptData(WideOpen(), 3));
  const std::string expected = Fetch(channel(), FetchRequest(handle)).bytes;
  NcclClient client(channel(), "client");
  NcclFetch fetch(channel(), &client, FetchRequest(handle));
  ASSERT_NE(fetch.ReadOne(), nullptr);
  ReleaseIt(handle);
  ExpectFetchFailure(FetchByPair(channel(), &client, FetchRequest(handle)),
                     grpc::StatusCode::NOT_FOUND, {"handle: no such cache is held"});
  EXPECT_GT(held_bytes(), 0);
  ExpectByNccl(fetch.Finish(), expected);
}

TEST_F(NcclFetchTest, TheLogNamesIt) {
  FILE* const log = tmpfile();
  ServerOptions options = Options();
  options.log = std::make_shared<rpc::Log>(rpc::LogFormat::kText, fileno(log));
  StartNccl(options);
  const std::string handle = HandleOf(PromptData(WideOpen(), 3));
  NcclClient client(channel(), "client");
  const size_t bytes = FetchByPair(channel(), &client, FetchRequest(handle)).bytes.size();
  const auto lines = [log] {
    std::string text(4096, '\0');
    text.resize(static_cast<size_t>(pread(fileno(log), text.data(), text.size(), 0)));
    return text;
  };
  EXPECT_TRUE(Eventually([&] { return lines().find(" fetch ") != std::string::npos; }));
  EXPECT_THAT(
      lines(),
      HasSubstr(" fetch client_session=- trace=- transport=nccl layers=4 kv_heads=4 output_bytes=" +
                std::to_string(bytes) + " micros="));
  ReleaseIt(handle);
  ExpectNothingHeld();
  EXPECT_TRUE(options.log->Flush(absl::Seconds(30)));
  fclose(log);
}

}  // namespace
}  // namespace structkv::testkit
