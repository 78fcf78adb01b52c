// A server of held caches that does what a test's script says, and an honest one's messages.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "structkv/client.h"
#include "structkv/v1/held_cache.grpc.pb.h"
#include "tests/client/fake_server.h"

namespace structkv::client {

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
    builder.RegisterService(&capabilities_);
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

  // Of its capabilities; not to be changed during a call.
  void set_region_socket(const std::string& path) { capabilities_.region_socket = path; }
  Client& client() { return *client_; }
  int attempts() const { return attempts_.load(); }

 private:
  struct Capabilities final : v1::Compression::Service {
    grpc::Status GetCapabilities(grpc::ServerContext*, const v1::GetCapabilitiesRequest*,
                                 v1::GetCapabilitiesResponse* response) override {
      response->set_region_socket(region_socket);
      return grpc::Status::OK;
    }
    std::string region_socket;
  };

  const FetchScript script_;
  Capabilities capabilities_;
  std::atomic<int> attempts_{0};
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Client> client_;
};

// Layers 1 and 2 of 4, 3 of 6 tokens kept, one head of 4 f32.
inline v1::CacheInfo Info() {
  v1::CacheInfo info;
  info.mutable_geometry()->set_layer_count(4);
  info.mutable_geometry()->set_query_head_count(2);
  info.mutable_geometry()->set_kv_head_count(1);
  info.mutable_geometry()->set_key_dim(4);
  info.mutable_geometry()->set_value_dim(4);
  info.mutable_held_kv_heads()->set_count(1);
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

inline std::string TensorBytes(uint32_t layer, v1::Tensor tensor) {
  if (tensor != v1::TENSOR_POSITIONS) return TestTensor(layer, tensor, 48);
  const int32_t positions[] = {0, 2, 4};
  return {reinterpret_cast<const char*>(positions), sizeof(positions)};
}

// What an honest server sends, in pieces of at most 20 bytes with a message each.
inline std::vector<v1::FetchCacheResponse> Honest(uint64_t skip = 0) {
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

inline std::string Text(const Bytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

inline void ExpectGood(const absl::StatusOr<FetchedCache>& fetched) {
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

inline FetchOptions Quick(int attempts) {
  FetchOptions options;
  options.first_layer = 1;
  options.layer_count = 2;
  options.retry.max_attempts = attempts;
  options.retry.initial_backoff = absl::Milliseconds(1);
  return options;
}

}  // namespace structkv::client
