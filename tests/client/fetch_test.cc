// Fetches from a server that breaks off, refuses or lies.
#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "tests/client/fake_holder.h"

namespace structkv::client {
namespace {

using ::testing::HasSubstr;

TEST(FetchTest, AsksForWhatItWasTold) {
  FakeHeldCaches server(
      [](int, grpc::ServerContext*, const v1::FetchCacheRequest& request, Writer* writer) {
        EXPECT_EQ(request.handle(), "handle");
        EXPECT_EQ(request.first_layer(), 1U);
        EXPECT_EQ(request.layer_count(), 2U);
        EXPECT_EQ(request.first_kv_head(), 3U);
        EXPECT_EQ(request.kv_head_count(), 1U);
        EXPECT_EQ(request.max_response_message_bytes(), 5U);
        EXPECT_TRUE(request.checksums());
        EXPECT_FALSE(request.info_only() || request.transports_size() > 0);
        auto responses = Honest();
        responses[0].mutable_info()->mutable_geometry()->set_kv_head_count(4);
        responses[0].mutable_info()->mutable_held_kv_heads()->set_begin(2);
        responses[0].mutable_info()->mutable_held_kv_heads()->set_count(2);
        responses[0].mutable_info()->mutable_kv_heads()->set_begin(3);
        for (const auto& response : responses) writer->Write(response);
        return grpc::Status::OK;
      });
  FetchOptions options = Quick(1);
  options.first_kv_head = 3;
  options.kv_head_count = 1;
  options.max_message_bytes = 5;
  options.checksums = true;
  ExpectGood(server.client().FetchCache("handle", options));
}

// It breaks after every message, so that every place between two pieces is one to go on from.
TEST(FetchTest, GoesOnWhereItBroke) {
  FakeHeldCaches server(
      [](int, grpc::ServerContext*, const v1::FetchCacheRequest& request, Writer* writer) {
        const auto responses = Honest(request.skip_bytes());
        for (size_t i = 0; i < std::min<size_t>(2, responses.size()); ++i)
          writer->Write(responses[i]);
        return responses.size() > 2 ? grpc::Status(grpc::StatusCode::UNAVAILABLE, "broken")
                                    : grpc::Status::OK;
      });
  const auto fetched = server.client().FetchCache("handle", Quick(2));
  ExpectGood(fetched);
  EXPECT_EQ(fetched->attempts, server.attempts());
  EXPECT_EQ(fetched->attempts, static_cast<int>(Honest().size()) - 1);
}

// The stream may break between the summary and its status.
TEST(FetchTest, GoesOnBehindTheSummary) {
  FakeHeldCaches server([](int attempt, grpc::ServerContext*, const v1::FetchCacheRequest& request,
                           Writer* writer) {
    for (const auto& response : Honest(request.skip_bytes())) writer->Write(response);
    return attempt == 1 ? grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone") : grpc::Status::OK;
  });
  const auto fetched = server.client().FetchCache("handle", Quick(3));
  ExpectGood(fetched);
  EXPECT_EQ(fetched->attempts, 2);
}

TEST(FetchTest, GivesUpWithoutProgressAndOnOtherErrors) {
  const auto fails = [](grpc::StatusCode code, bool pushback) {
    return
        [code, pushback](int, grpc::ServerContext* context, const v1::FetchCacheRequest&, Writer*) {
          if (pushback) context->AddTrailingMetadata("grpc-retry-pushback-ms", "1");
          return grpc::Status(code, "no");
        };
  };
  const std::tuple<grpc::StatusCode, bool, int> cases[] = {
      {grpc::StatusCode::UNAVAILABLE, false, 3},
      {grpc::StatusCode::RESOURCE_EXHAUSTED, true, 3},
      {grpc::StatusCode::RESOURCE_EXHAUSTED, false, 1},
      {grpc::StatusCode::NOT_FOUND, false, 1},
      {grpc::StatusCode::ABORTED, false, 1}};
  for (const auto& [code, pushback, attempts] : cases) {
    FakeHeldCaches server(fails(code, pushback));
    const auto fetched = server.client().FetchCache("handle", Quick(3));
    EXPECT_EQ(static_cast<int>(fetched.status().code()), static_cast<int>(code));
    EXPECT_EQ(server.attempts(), attempts) << code;
  }
}

struct Lie {
  const char* name;
  std::function<void(std::vector<v1::FetchCacheResponse>*)> tell;
  const char* text;
};

void PrintTo(const Lie& lie, std::ostream* out) { *out << lie.name; }

// A lie in the first message.
std::function<void(std::vector<v1::FetchCacheResponse>*)> Says(
    std::function<void(v1::CacheInfo*)> lie) {
  return [lie](std::vector<v1::FetchCacheResponse>* responses) {
    lie(responses->front().mutable_info());
  };
}

class LyingHolderTest : public ::testing::TestWithParam<Lie> {};

TEST_P(LyingHolderTest, IsDataLoss) {
  FakeHeldCaches server(
      [](int, grpc::ServerContext*, const v1::FetchCacheRequest&, Writer* writer) {
        auto responses = Honest();
        GetParam().tell(&responses);
        for (const auto& response : responses) writer->Write(response);
        return grpc::Status::OK;
      });
  const absl::Status status = server.client().FetchCache("handle", Quick(3)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().text));
  EXPECT_EQ(server.attempts(), 1) << "a liar is not asked again";
}

using Responses = std::vector<v1::FetchCacheResponse>;
INSTANTIATE_TEST_SUITE_P(
    , LyingHolderTest,
    ::testing::ValuesIn<std::vector<Lie>>({
        {"NoInfo", [](Responses* r) { r->erase(r->begin()); }, "first message is not `info`"},
        {"InfoTwice", [](Responses* r) { r->insert(r->begin(), r->front()); }, "`info` came twice"},
        {"NoSummary", [](Responses* r) { r->pop_back(); }, "without a summary"},
        {"SummaryTwice", [](Responses* r) { r->push_back(r->back()); }, "after the summary"},
        {"SummaryEarly", [](Responses* r) { std::swap((*r)[2], r->back()); }, "FetchSummary says"},
        {"SentBytes",
         [](Responses* r) { r->back().mutable_summary()->set_sent_bytes(1); }, "FetchSummary says"},
        {"MissingPiece", [](Responses* r) { r->erase(r->begin() + 3); }, "out of place"},
        {"PieceTwice", [](Responses* r) { r->insert(r->begin() + 2, (*r)[2]); }, "out of place"},
        {"OtherTensor",
         [](Responses* r) {
           (*r)[2].mutable_layer()->mutable_pieces(0)->set_tensor(v1::TENSOR_SALIENCY);
         },
         "out of place"},
        {"LongPiece",
         [](Responses* r) {
           (*r)[1].mutable_layer()->mutable_pieces(0)->set_data(std::string(13, 'x'));
         },
         "out of place"},
        {"Range",
         [](Responses* r) {
           v1::TensorPiece* piece = (*r)[2].mutable_layer()->mutable_pieces(0);
           const uint64_t size = piece->data().size();
           piece->mutable_range()->set_size_bytes(size);
         },
         "is a range, which is not due"},
        {"HugeOffset",
         [](Responses* r) {
           (*r)[2].mutable_layer()->mutable_pieces(0)->set_offset_bytes(~uint64_t{0});
         },
         "out of place"},
        {"OtherLayer", [](Responses* r) { (*r)[1].mutable_layer()->set_layer(3); },
         "layer 3 came where layer 1"},
        {"LayerPastTheEnd",
         [](Responses* r) { r->insert(r->end() - 1, (*r)[1]); }, "where nothing was due"},
        {"KeptTokens", [](Responses* r) { (*r)[1].mutable_layer()->set_kept_tokens(2); },
         "has 2 tokens"},
        {"CompleteEarly", [](Responses* r) { (*r)[1].mutable_layer()->set_complete(true); },
         "marked as complete"},
        {"NeverComplete",
         [](Responses* r) {
           for (auto& response : *r) {
             if (response.has_layer()) response.mutable_layer()->set_complete(false);
           }
         },
         "not marked as complete"},
        {"Checksum",
         [](Responses* r) { (*r)[2].mutable_layer()->mutable_pieces(0)->set_xxh3_64(1); },
         "checksum mismatch"},
        {"Position",
         [](Responses* r) {
           std::string* data = (*r)[1].mutable_layer()->mutable_pieces(0)->mutable_data();
           (*data)[0] = 6;
         },
         "keeps position 6 of 6"},
        {"LayerBytes", Says([](auto* i) { i->set_layer_bytes(0, 1); }),
         "CacheInfo.layer_bytes is 1 of layer 1, whose tensors have 108"},
        {"TotalBytes", Says([](auto* i) { i->set_total_bytes(9); }),
         "CacheInfo.total_bytes is 9, its layers have 216"},
        {"KeptTokensOfInfo", Says([](auto* i) { i->set_kept_tokens(1, 7); }),
         "CacheInfo.kept_tokens is 7 of layer 2; kv_length is 3"},
        {"KvLength", Says([](auto* i) { i->set_kv_length(7); }),
         "CacheInfo.kv_length is 7; 0 to 6"},
        {"Entries", Says([](auto* i) { i->add_kept_tokens(3); }),
         "CacheInfo.kept_tokens has 3 entries and layer_bytes 2, for 2 layers"},
        {"Layers", Says([](auto* i) { i->set_layer_count(4); }),
         "CacheInfo.layer_count is 4; 2 was asked for"},
        {"FirstLayer", Says([](auto* i) { i->set_first_layer(0); }),
         "CacheInfo.first_layer is 0; 1 was asked for"},
        {"NoSuchLayers", Says([](auto* i) { i->mutable_geometry()->set_layer_count(2); }),
         "CacheInfo.layer_count is 2; 1 to 1"},
        {"AllLayers", Says([](auto* i) { i->mutable_geometry()->set_layer_count(~0U); }),
         "CacheInfo.geometry.layer_count is 4294967295; 1 to 16384"},
        {"Heads", Says([](auto* i) { i->mutable_kv_heads()->set_count(2); }),
         "CacheInfo.kv_heads.count is 2; 1 was asked for"},
        {"FirstHead", Says([](auto* i) { i->mutable_kv_heads()->set_begin(1); }),
         "CacheInfo.kv_heads.begin is 1; 0 was asked for"},
        {"HeldHeads", Says([](auto* i) { i->mutable_held_kv_heads()->set_count(2); }),
         "CacheInfo.held_kv_heads.begin + count is 2; 1 to 1"},
        {"NoHeldHeads", Says([](auto* i) { i->clear_held_kv_heads(); }),
         "CacheInfo.held_kv_heads.count is 0"},
        {"AllHeads", Says([](auto* i) { i->mutable_geometry()->set_kv_head_count(~0U); }),
         "CacheInfo.geometry.kv_head_count is 4294967295; 1 to 16384"},
        {"QueryHeads", Says([](auto* i) { i->mutable_geometry()->clear_query_head_count(); }),
         "CacheInfo.geometry.query_head_count is 0"},
        {"KeyDim", Says([](auto* i) { i->mutable_geometry()->set_key_dim(~0U); }),
         "CacheInfo.geometry.key_dim is 4294967295; 1 to 16384"},
        {"ValueDim", Says([](auto* i) { i->mutable_geometry()->set_value_dim(20000); }),
         "CacheInfo.geometry.value_dim is 20000; 0 to 16384"},
        {"Blocks", Says([](auto* i) { i->set_block_tokens(~0U); }),
         "CacheInfo.block_tokens is 4294967295; 0 to 4096"},
        {"Length", Says([](auto* i) { i->set_logical_length(~0U); }),
         "CacheInfo.logical_length is 4294967295; 1 to 2147483647"},
        {"DType", Says([](auto* i) { i->clear_dtype(); }), "CacheInfo.dtype is 0"},
        {"Transport", Says([](auto* i) { i->set_transport(v1::TRANSPORT_SHARED_MEMORY); }),
         "CacheInfo.transport is TRANSPORT_SHARED_MEMORY, which the fetch did not name"},
    }),
    [](const ::testing::TestParamInfo<Lie>& lie) { return lie.param.name; });

TEST(FetchTest, AnotherCacheAfterABreakIsDataLoss) {
  FakeHeldCaches server(
      [](int attempt, grpc::ServerContext*, const v1::FetchCacheRequest& request, Writer* writer) {
        auto responses = Honest(request.skip_bytes());
        if (attempt == 2) responses[0].mutable_info()->set_fingerprint("another");
        writer->Write(responses[0]);
        writer->Write(responses[1]);
        return grpc::Status(grpc::StatusCode::UNAVAILABLE, "broken");
      });
  const absl::Status status = server.client().FetchCache("handle", Quick(3)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("another than before"));
}

// However much a server says that it holds, memory is taken for no more than the caller allows.
TEST(FetchTest, MoreThanTheCallerAllowsIsRefusedBeforeMemoryIsTaken) {
  FakeHeldCaches server(
      [](int, grpc::ServerContext*, const v1::FetchCacheRequest&, Writer* writer) {
        auto responses = Honest();
        v1::CacheInfo* info = responses[0].mutable_info();
        info->set_logical_length(INT32_MAX);
        info->set_kv_length(INT32_MAX);
        info->set_kept_tokens(0, INT32_MAX);
        info->set_layer_bytes(0, uint64_t{INT32_MAX} * (4 + 16 + 16));
        info->set_total_bytes(info->layer_bytes(0) + 108);
        for (const auto& response : responses) writer->Write(response);
        return grpc::Status::OK;
      });
  FetchOptions options = Quick(3);
  options.allocate = [](uint32_t, v1::Tensor, size_t) {
    ADD_FAILURE() << "memory was asked for";
    return Bytes();
  };
  for (const uint64_t most : {FetchOptions().max_bytes, uint64_t{1000}}) {
    options.max_bytes = most;
    const absl::Status status = server.client().FetchCache("handle", options).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("CacheInfo.layer_bytes up to layer 1 are 0 and 77309411292; "
                          "FetchOptions.max_bytes is " +
                          std::to_string(most)));
  }
  EXPECT_EQ(server.attempts(), 2);
}

TEST(FetchTest, DescribesWhatItWouldBring) {
  FakeHeldCaches server(
      [](int attempt, grpc::ServerContext*, const v1::FetchCacheRequest& request, Writer* writer) {
        EXPECT_TRUE(request.info_only());
        if (attempt == 1) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "not yet");
        const auto responses = Honest();
        writer->Write(responses.front());
        writer->Write(attempt == 2 ? responses.back() : responses[1]);
        return grpc::Status::OK;
      });
  const auto info = server.client().DescribeCache("handle", Quick(2));
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->SerializeAsString(), Info().SerializeAsString());
  EXPECT_EQ(FetchResultBytes(*info), 2U * (64 + 64));
  EXPECT_TRUE(absl::IsDataLoss(server.client().DescribeCache("handle", Quick(2)).status()));
  EXPECT_EQ(server.attempts(), 3);
}

TEST(FetchTest, ASmallAllocationIsTheCallersFault) {
  FakeHeldCaches server(
      [](int, grpc::ServerContext*, const v1::FetchCacheRequest&, Writer* writer) {
        for (const auto& response : Honest()) writer->Write(response);
        return grpc::Status::OK;
      });
  FetchOptions options = Quick(1);
  options.allocate = [](uint32_t, v1::Tensor, size_t) { return Bytes(); };
  const absl::Status status = server.client().FetchCache("handle", options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("FetchOptions.allocate gave 0"));
}

}  // namespace
}  // namespace structkv::client
