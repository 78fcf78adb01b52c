// Fetches into shared memory from a server that loses it, breaks off or lies.
#include <cstring>
#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/arena.h"
#include "tests/client/fake_holder.h"
#include "tests/client/fake_region_socket.h"

namespace structkv::client {
namespace {

using ::testing::HasSubstr;
using Responses = std::vector<v1::FetchCacheResponse>;

constexpr uint64_t kStride = 128;  // 48 bytes of keys and of values, rounded up

class FetchRegionTest : public ::testing::Test {
 protected:
  FetchRegionTest() : arena_(std::make_shared<Arena>(*Region::Create({.size_bytes = 1 << 16}))) {}

  FetchOptions Options(TransportChoice choice) {
    FetchOptions options = Quick(3);
    options.results = arena_;
    options.transport = choice;
    return options;
  }
  // What an honest server sends, and writes where the request says.
  Responses InPlace(const v1::FetchCacheRequest& request) {
    Responses responses = Honest(request.skip_bytes());
    v1::CacheInfo* info = responses[0].mutable_info();
    if (request.transports_size() == 0 || request.info_only()) return Cut(responses, request);
    info->set_transport(request.transports(0));
    for (v1::FetchCacheResponse& response : responses) {
      if (!response.has_layer()) continue;
      v1::TensorPiece* piece = response.mutable_layer()->mutable_pieces(0);
      if (piece->tensor() == v1::TENSOR_POSITIONS) continue;
      const std::string data = piece->data();
      const uint64_t at = request.result_range().offset_bytes() + (piece->layer() - 1) * kStride +
                          (piece->tensor() == v1::TENSOR_VALUES ? kStride / 2 : 0) +
                          piece->offset_bytes();
      std::memcpy(socket_.regions().back().memory.get() + at, data.data(), data.size());
      piece->mutable_range()->set_offset_bytes(at);
      piece->mutable_range()->set_size_bytes(data.size());
    }
    return responses;
  }
  static Responses Cut(const Responses& responses, const v1::FetchCacheRequest& request) {
    if (!request.info_only()) return responses;
    Responses short_ones = {responses.front(), responses.back()};
    short_ones.back().mutable_summary()->set_sent_bytes(0);
    return short_ones;
  }
  static grpc::Status Send(const Responses& responses, Writer* writer, size_t most = 1000) {
    for (size_t i = 0; i < std::min(most, responses.size()); ++i) writer->Write(responses[i]);
    return responses.size() > most ? grpc::Status(grpc::StatusCode::UNAVAILABLE, "broken")
                                   : grpc::Status::OK;
  }
  bool LiesInArena(const Bytes& bytes) {
    return arena_->region()->OffsetOf(bytes.span()).has_value();
  }

  FakeRegionSocket socket_;
  std::shared_ptr<Arena> arena_;
};

TEST_F(FetchRegionTest, GoesOnWhereItBrokeAndKeepsTheRoomUntilTheServerIsDone) {
  FakeHeldCaches server(
      [this](int, grpc::ServerContext*, const v1::FetchCacheRequest& request, Writer* writer) {
        return Send(InPlace(request), writer, request.info_only() ? 2 : 3);
      });
  server.set_region_socket(socket_.path());
  {
    const auto fetched =
        server.client().FetchCache("handle", Options(TransportChoice::kSharedMemory));
    ExpectGood(fetched);
    EXPECT_GT(fetched->attempts, 4);
    EXPECT_EQ(fetched->info.transport(), v1::TRANSPORT_SHARED_MEMORY);
    for (const LayerResult& layer : fetched->layers) {
      EXPECT_TRUE(LiesInArena(layer.keys) && LiesInArena(layer.values));
      EXPECT_FALSE(LiesInArena(layer.positions));
    }
  }
  EXPECT_LT(arena_->free_bytes(), arena_->region()->size()) << "a broken stream may still write";
}

// What lies elsewhere by then stays there, also once the region can be had.
TEST_F(FetchRegionTest, AFetchThatBeganInMessagesGoesOnSo) {
  socket_.Refuse(8, "full");
  FakeHeldCaches server([this](int attempt, grpc::ServerContext*,
                               const v1::FetchCacheRequest& request, Writer* writer) {
    EXPECT_FALSE(request.info_only());
    EXPECT_EQ(request.regions_size(), 0);
    socket_.Refuse(0, "");
    return Send(InPlace(request), writer, attempt == 1 ? 3 : 1000);
  });
  server.set_region_socket(socket_.path());
  const auto fetched = server.client().FetchCache("handle", Options(TransportChoice::kAuto));
  ExpectGood(fetched);
  EXPECT_EQ(fetched->attempts, 2);
  EXPECT_FALSE(LiesInArena(fetched->layers[1].keys));
  EXPECT_THAT(fetched->info.transport_reason(), HasSubstr("has begun without a room"));
}

TEST_F(FetchRegionTest, ARegionThatIsNotKnownIsRegisteredAnewAndThenDoneWithout) {
  for (const TransportChoice choice : {TransportChoice::kSharedMemory, TransportChoice::kAuto}) {
    int refused = 0;
    FakeHeldCaches server(
        [&](int, grpc::ServerContext*, const v1::FetchCacheRequest& request, Writer* writer) {
          if (request.regions_size() > 0 && !request.info_only()) {
            ++refused;
            return grpc::Status(grpc::StatusCode::NOT_FOUND, "regions[0]: is not registered");
          }
          return Send(InPlace(request), writer);
        });
    server.set_region_socket(socket_.path());
    const auto fetched = server.client().FetchCache("handle", Options(choice));
    EXPECT_EQ(refused, 2);
    if (choice == TransportChoice::kSharedMemory) {
      EXPECT_TRUE(absl::IsNotFound(fetched.status())) << fetched.status();
      continue;
    }
    ExpectGood(fetched);
    EXPECT_EQ(fetched->attempts, 3);
    EXPECT_EQ(fetched->info.transport(), v1::TRANSPORT_INLINE);
    EXPECT_THAT(fetched->info.transport_reason(), HasSubstr("does not know the registered region"));
    EXPECT_TRUE(LiesInArena(fetched->layers[0].keys)) << "the room was there already";
  }
}

TEST_F(FetchRegionTest, WhatCannotBeHadIsAReasonOrAnError) {
  FakeHeldCaches server([this](int, grpc::ServerContext*, const v1::FetchCacheRequest& request,
                               Writer* writer) { return Send(InPlace(request), writer); });
  const auto expect = [&](FetchOptions options, absl::StatusCode code, const char* text) {
    options.transport = TransportChoice::kAuto;
    const auto fetched = server.client().FetchCache("handle", options);
    ExpectGood(fetched);
    EXPECT_EQ(fetched->info.transport(), v1::TRANSPORT_INLINE);
    EXPECT_THAT(fetched->info.transport_reason(), HasSubstr(text));
    options.transport = TransportChoice::kSharedMemory;
    const absl::Status status = server.client().FetchCache("handle", options).status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  };
  expect(Options(TransportChoice::kAuto), absl::StatusCode::kUnimplemented,
         "the server has no shared memory");
  expect(Quick(1), absl::StatusCode::kInvalidArgument,
         "no region was given (FetchOptions.results)");
  server.set_region_socket(socket_.path());
  socket_.Refuse(8, "full");
  // What it lacked a moment ago is asked for again, where somebody insists.
  EXPECT_TRUE(absl::IsResourceExhausted(server.client().Register(*arena_->region())));
  expect(Options(TransportChoice::kAuto), absl::StatusCode::kResourceExhausted, "full");
  socket_.Refuse(0, "");
  const auto block = arena_->Allocate(arena_->region()->size() - 64);
  const auto fetched = server.client().FetchCache("handle", Options(TransportChoice::kAuto));
  EXPECT_TRUE(absl::IsResourceExhausted(fetched.status())) << fetched.status();
  EXPECT_THAT(std::string(fetched.status().message()), HasSubstr("FetchOptions.results: "));
}

struct Lie {
  const char* name;
  std::function<void(v1::FetchCacheResponse*)> tell;  // of each message
  const char* text;
};

void PrintTo(const Lie& lie, std::ostream* out) { *out << lie.name; }

class LyingWriterTest : public FetchRegionTest, public ::testing::WithParamInterface<Lie> {};

TEST_P(LyingWriterTest, IsDataLoss) {
  FakeHeldCaches server(
      [this](int, grpc::ServerContext*, const v1::FetchCacheRequest& request, Writer* writer) {
        Responses responses = InPlace(request);
        for (v1::FetchCacheResponse& response : responses) {
          if (!request.info_only()) GetParam().tell(&response);
        }
        return Send(responses, writer);
      });
  server.set_region_socket(socket_.path());
  const absl::Status status =
      server.client().FetchCache("handle", Options(TransportChoice::kAuto)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().text));
  EXPECT_EQ(server.attempts(), 2) << "a description, and one fetch";
}

// On the pieces of layer 2's values.
std::function<void(v1::FetchCacheResponse*)> OnValues(std::function<void(v1::TensorPiece*)> lie) {
  return [lie](v1::FetchCacheResponse* response) {
    if (response->layer().layer() != 2) return;
    v1::TensorPiece* piece = response->mutable_layer()->mutable_pieces(0);
    if (piece->tensor() == v1::TENSOR_VALUES) lie(piece);
  };
}

INSTANTIATE_TEST_SUITE_P(
    , LyingWriterTest,
    ::testing::ValuesIn<std::vector<Lie>>({
        {"OtherPlace", OnValues([](auto* p) { p->mutable_range()->set_offset_bytes(64); }),
         "lies at 64 of region 0; 192 of region 0 is due"},
        {"OtherRegion", OnValues([](auto* p) { p->mutable_range()->set_region(1); }),
         "of region 1; "},
        {"TooLong", OnValues([](auto* p) { p->mutable_range()->set_size_bytes(49); }),
         "out of place"},
        {"Overflows", OnValues([](auto* p) { p->mutable_range()->set_size_bytes(~uint64_t{0}); }),
         "out of place"},
        {"Data", OnValues([](auto* p) { p->set_data(std::string(20, 'x')); }),
         "is no range, and a range is due"},
        {"Positions",
         [](v1::FetchCacheResponse* response) {
           if (!response->has_layer()) return;
           v1::TensorPiece* piece = response->mutable_layer()->mutable_pieces(0);
           if (piece->tensor() == v1::TENSOR_POSITIONS) piece->mutable_range()->set_size_bytes(12);
         },
         "is a range, which is not due"},
        {"RangesInline",
         [](v1::FetchCacheResponse* response) {
           if (response->has_info()) {
             response->mutable_info()->set_transport(v1::TRANSPORT_INLINE);
           }
         },
         "is a range, which is not due"},
        {"OtherTransport",
         [](v1::FetchCacheResponse* response) {
           if (response->has_info()) {
             response->mutable_info()->set_transport(v1::TRANSPORT_CUDA_IPC);
           }
         },
         "CacheInfo.transport is TRANSPORT_CUDA_IPC"},
        {"MoreThanItSaid",
         [](v1::FetchCacheResponse* response) {
           if (!response->has_info()) return;
           v1::CacheInfo& more = *response->mutable_info();
           more.set_kv_length(6);
           more.set_kept_tokens(0, 6);
           more.set_layer_bytes(0, 6 * 36);
           more.set_total_bytes(6 * 36 + 108);
         },
         "CacheInfo.kept_tokens need 512 bytes, before they needed 256"},
    }),
    [](const ::testing::TestParamInfo<Lie>& lie) { return lie.param.name; });

}  // namespace
}  // namespace structkv::client
