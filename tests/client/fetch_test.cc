// Fetches from a server that breaks off, refuses or lies.
#include <atomic>
#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "structkv/client.h"
#include "structkv/v1/held_cache.grpc.pb.h"
#include "tests/client/fake_server.h"

namespace structkv::client {
namespace {

using ::testing::HasSubstr;
using Writer = grpc::ServerWriter<v1::FetchCacheResponse>;
using FetchScript = std::function<grpc::Status(int attempt, grpc::ServerContext* context,
                                               const v1::FetchCacheRequest& request, Writer*)>;

class FakeHeldCaches final : public v1::HeldCaches::Service {
 public:
  explicit FakeHeldCaches(FetchScript script) : script_(std::move(script)) {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    client_ = *Client::Connect("127.0.0.1:" + std::to_string(port));
  }
  ~FakeHeldCaches() override {
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
  }

  grpc::Status FetchCache(grpc::ServerContext* context, const v1::FetchCacheRequest* request,
                          Writer* writer) override {
    return script_(attempts_.fetch_add(1) + 1, context, *request, writer);
  }

  Client& client() { return *client_; }
  int attempts() const { return attempts_.load(); }

 private:
  const FetchScript script_;
  std::atomic<int> attempts_{0};
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Client> client_;
};

// Layers 1 and 2 of 4, 3 of 6 tokens kept, one head of 4 f32.
v1::CacheInfo Info() {
  v1::CacheInfo info;
  info.mutable_geometry()->set_layer_count(4);
  info.mutable_geometry()->set_query_head_count(2);
  info.mutable_geometry()->set_kv_head_count(1);
  info.mutable_geometry()->set_key_dim(4);
  info.mutable_geometry()->set_value_dim(4);
  info.mutable_kv_heads()->set_count(1);
  info.set_first_layer(1);
  info.set_layer_count(2);
  info.set_dtype(v1::DTYPE_F32);
  info.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  info.set_logical_length(6);
  info.set_kv_length(3);
  for (int i = 0; i < 2; ++i) {
    info.add_kept_tokens(3);
    info.add_layer_bytes(12 + 48 + 48);
  }
  info.set_total_bytes(2 * (12 + 48 + 48));
  info.set_fingerprint("f");
  info.mutable_method()->mutable_snapkv()->set_granularity(v1::GRANULARITY_PER_LAYER);
  return info;
}

std::string TensorBytes(uint32_t layer, v1::Tensor tensor) {
  if (tensor != v1::TENSOR_POSITIONS) return TestTensor(layer, tensor, 48);
  const int32_t positions[] = {0, 2, 4};
  return {reinterpret_cast<const char*>(positions), sizeof(positions)};
}

// What an honest server sends, in pieces of at most 20 bytes with a message each.
std::vector<v1::FetchCacheResponse> Honest(uint64_t skip = 0) {
  std::vector<v1::FetchCacheResponse> responses(1);
  *responses[0].mutable_info() = Info();
  uint64_t passed = 0;
  uint64_t sent = 0;
  for (const uint32_t layer : {1U, 2U}) {
    for (const v1::Tensor tensor : {v1::TENSOR_POSITIONS, v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
      const std::string bytes = TensorBytes(layer, tensor);
      for (size_t at = 0; at < bytes.size();) {
        if (passed < skip) {
          const auto step = std::min<uint64_t>(skip - passed, bytes.size() - at);
          at += step;
          passed += step;
          continue;
        }
        v1::LayerResult* result = responses.emplace_back().mutable_layer();
        result->set_layer(layer);
        result->set_kept_tokens(3);
        v1::TensorPiece* piece = result->add_pieces();
        piece->set_layer(layer);
        piece->set_tensor(tensor);
        piece->set_offset_bytes(at);
        piece->set_data(bytes.substr(at, 20));
        at += piece->data().size();
        sent += piece->data().size();
        result->set_complete(tensor == v1::TENSOR_VALUES && at == bytes.size());
      }
    }
  }
  v1::FetchSummary* summary = responses.emplace_back().mutable_summary();
  summary->set_total_bytes(Info().total_bytes());
  summary->set_sent_bytes(sent);
  return responses;
}

std::string Text(const Bytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void ExpectGood(const absl::StatusOr<FetchedCache>& fetched) {
  ASSERT_TRUE(fetched.ok()) << fetched.status();
  ASSERT_EQ(fetched->layers.size(), 2U);
  for (size_t i = 0; i < 2; ++i) {
    const auto layer = static_cast<uint32_t>(i + 1);
    EXPECT_EQ(fetched->layers[i].layer, layer);
    EXPECT_EQ(Text(fetched->layers[i].positions), TensorBytes(layer, v1::TENSOR_POSITIONS));
    EXPECT_EQ(Text(fetched->layers[i].keys), TensorBytes(layer, v1::TENSOR_KEYS));
    EXPECT_EQ(Text(fetched->layers[i].values), TensorBytes(layer, v1::TENSOR_VALUES));
  }
}

FetchOptions Quick(int attempts) {
  FetchOptions options;
  options.retry.max_attempts = attempts;
  options.retry.initial_backoff = absl::Milliseconds(1);
  return options;
}

TEST(FetchTest, AsksForWhatItWasTold) {
  FakeHeldCaches server(
      [](int, grpc::ServerContext*, const v1::FetchCacheRequest& request, Writer* writer) {
        EXPECT_EQ(request.handle(), "handle");
        EXPECT_EQ(request.first_layer(), 1U);
        EXPECT_EQ(request.layer_count(), 2U);
        EXPECT_EQ(request.first_kv_head(), 3U);
        EXPECT_EQ(request.kv_head_count(), 4U);
        EXPECT_EQ(request.max_response_message_bytes(), 5U);
        EXPECT_TRUE(request.checksums());
        for (const auto& response : Honest()) writer->Write(response);
        return grpc::Status::OK;
      });
  FetchOptions options = Quick(1);
  options.first_layer = 1;
  options.layer_count = 2;
  options.first_kv_head = 3;
  options.kv_head_count = 4;
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
         "is a range"},
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
        {"LayerBytes",
         [](Responses* r) {
           r->front().mutable_info()->set_layer_bytes(0, 1);
           r->front().mutable_info()->set_total_bytes(109);
         },
         "CacheInfo.layer_bytes is 1"},
        {"TotalBytes", [](Responses* r) { r->front().mutable_info()->set_total_bytes(9); },
         "CacheInfo.total_bytes is 9"},
        {"KeptTokensOfInfo", [](Responses* r) { r->front().mutable_info()->set_kept_tokens(1, 7); },
         "kept_tokens is 7 of 6"},
        {"Layers", [](Responses* r) { r->front().mutable_info()->set_layer_count(4); },
         "of 4"},
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
