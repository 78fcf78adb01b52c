// Held caches over the public API alone: prompts that end with a handle, and what is fetched by it.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "structkv/v1/held_cache.grpc.pb.h"
#include "tests/testing/answer.h"
#include "tests/testing/prompt_data.h"
#include "tests/testing/shared_region.h"

namespace structkv::testkit {

using Metadata = std::vector<std::pair<std::string, std::string>>;

// The prompt with OUTPUT_HOLD.
v1::Open Held(v1::Open open);

// What came of a fetch.
struct Fetched {
  grpc::Status status;
  std::map<std::string, std::string> trailers;
  std::optional<v1::CacheInfo> info;
  std::map<uint32_t, LayerAnswer> layers;
  std::string bytes;         // of all pieces, in the order in which they came
  size_t message_bytes = 0;  // of them in messages
  std::optional<v1::FetchSummary> summary;
  size_t longest_message = 0;
  size_t messages = 0;
  std::vector<std::string> faults;  // against the promised order
};

// Collects the answers to a request.
class FetchRecord {
 public:
  // `region`: as FetchCall.
  explicit FetchRecord(const v1::FetchCacheRequest& request, const SharedFile* region = nullptr)
      : region_(region), skip_(request.skip_bytes()), info_only_(request.info_only()) {}
  void Take(const v1::FetchCacheResponse& response);
  // The call of `context` ended.
  Fetched Finish(const grpc::Status& status, const grpc::ClientContext& context);

 private:
  const SharedFile* const region_;
  const uint64_t skip_;
  const bool info_only_;
  Fetched fetched_;
};

// Of every call: metadata, and a deadline that fits tests.
void Prepare(const Metadata& metadata, grpc::ClientContext* context);

// A fetch that is read when the test wants.
class FetchCall {
 public:
  // `region`: what the request's region is; outlives the call. What is written there is taken when
  // the message that says so was read.
  FetchCall(const std::shared_ptr<grpc::Channel>& channel, const v1::FetchCacheRequest& request,
            const Metadata& metadata = {}, const SharedFile* region = nullptr);
  // Reads one message; false at the end.
  bool ReadOne();
  void Cancel() { context_.TryCancel(); }
  // Reads to the end.
  Fetched Finish();

 private:
  grpc::ClientContext context_;
  std::unique_ptr<v1::HeldCaches::Stub> stub_;
  std::unique_ptr<grpc::ClientReader<v1::FetchCacheResponse>> reader_;
  FetchRecord record_;
};

Fetched Fetch(const std::shared_ptr<grpc::Channel>& channel, const v1::FetchCacheRequest& request,
              const Metadata& metadata = {}, const SharedFile* region = nullptr);
v1::FetchCacheRequest FetchRequest(const std::string& handle);
// Into all of a region from `offset` on, over shared memory.
v1::FetchCacheRequest Into(v1::FetchCacheRequest request, const std::string& region,
                           const SharedFile& file, uint64_t offset = 0);

grpc::Status Renew(const std::shared_ptr<grpc::Channel>& channel, const std::string& handle,
                   const Metadata& metadata = {}, std::optional<uint64_t> lease_millis = {},
                   uint64_t* in_force = nullptr);
grpc::Status Release(const std::shared_ptr<grpc::Channel>& channel, const std::string& handle,
                     const Metadata& metadata = {});

// KV heads `range`, of the `heads` that the answer has, of a layer's tensors without saliency, as
// they come to a caller that asks for them.
std::map<v1::Tensor, std::string> HeadsOf(const v1::Open& open, const LayerAnswer& layer,
                                          uint32_t heads, const v1::HeadRange& range);

}  // namespace structkv::testkit
