// A server that does what a test's script says, in ordinary protobuf: what the client's
// hand-written codec sends, it reads, and the reverse.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "grpcpp/grpcpp.h"
#include "structkv/client.h"
#include "structkv/v1/compression.grpc.pb.h"
#include "structkv/v1/region.grpc.pb.h"

namespace structkv::client {

using Stream = grpc::ServerReaderWriter<v1::CompressResponse, v1::CompressRequest>;

// One call's script; `attempt` counts from 1.
using Script =
    std::function<grpc::Status(int attempt, grpc::ServerContext* context, Stream* stream)>;

// Its regions. What is not set is UNIMPLEMENTED, and what is unregistered has been closed.
class FakeRegions final : public v1::Regions::Service {
 public:
  std::function<grpc::Status(const v1::RegisterRegionRequest&, v1::RegisterRegionResponse*)>
      on_register;
  std::function<grpc::Status(const v1::GetRegionRequest&, v1::GetRegionResponse*)> on_get;

  grpc::Status RegisterRegion(grpc::ServerContext* context,
                              const v1::RegisterRegionRequest* request,
                              v1::RegisterRegionResponse* response) override;
  grpc::Status GetRegion(grpc::ServerContext* context, const v1::GetRegionRequest* request,
                         v1::GetRegionResponse* response) override;
  grpc::Status UnregisterRegion(grpc::ServerContext* context,
                                const v1::UnregisterRegionRequest* request,
                                v1::UnregisterRegionResponse* response) override;
};

class FakeServer final : public v1::Compression::Service {
 public:
  explicit FakeServer(Script script);
  ~FakeServer() override;

  const std::string& address() const { return address_; }
  int attempts() const { return attempts_.load(); }
  // Not to be changed during a call. Of its capabilities:
  std::string region_socket;
  std::vector<std::string> transports;
  FakeRegions regions;

  grpc::Status Compress(grpc::ServerContext* context, Stream* stream) override;
  grpc::Status GetCapabilities(grpc::ServerContext* context,
                               const v1::GetCapabilitiesRequest* request,
                               v1::GetCapabilitiesResponse* response) override;

 private:
  const Script script_;
  std::string address_;
  std::atomic<int> attempts_{0};
  std::unique_ptr<grpc::Server> server_;
};

inline std::unique_ptr<Client> ClientOf(const FakeServer& server) {
  return *Client::Connect(server.address());
}

// 2 layers, 2 query heads, 1 KV head, 6 tokens of 4-element f32 vectors, method snapkv.
v1::Open SmallOpen();

// An honest `Opened`: window of 2, every layer keeps 3 tokens.
v1::Opened OpenedFor(const v1::Open& open);

// Tensor bytes that a test sends: different in every layer and tensor.
std::string TestTensor(uint32_t layer, v1::Tensor tensor, size_t bytes);

inline absl::Span<const std::byte> AsBytes(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

// What a client has sent, put together again.
struct Received {
  v1::Open open;
  std::map<std::pair<uint32_t, int>, std::string> tensors;
  size_t messages = 0;
  size_t longest_message = 0;
  size_t checksums = 0;
  v1::Commit commit;
  bool committed = false;
};

// Adds a message that is no `open`.
void Take(const v1::CompressRequest& request, Received* received);

// Reads `open`.
bool ReadOpen(Stream* stream, Received* received);
// Reads pieces until the commit, or the stream's end.
void ReadToCommit(Stream* stream, Received* received);

void SendOpened(Stream* stream, const v1::Opened& opened, uint32_t prompt = 0);
// The answer to `layer`: positions 0, 2, 4 and bytes made by TestTensor(layer + 100, ...).
v1::CompressResponse LayerResponse(const v1::Open& open, uint32_t layer, uint32_t prompt = 0);
v1::Summary SummaryFor(const v1::Open& open, const v1::Opened& opened, uint64_t input_bytes);
void SendSummary(Stream* stream, const v1::Summary& summary, uint32_t prompt = 0);
void SendFailed(Stream* stream, uint32_t prompt, grpc::StatusCode code, const std::string& text,
                std::optional<uint64_t> retry_after_millis = std::nullopt);
// Answers all layers, and the summary.
void Answer(Stream* stream, const Received& received, uint32_t prompt = 0);

// Answers honestly from start to end.
grpc::Status Behave(Stream* stream, Received* received);
// The same for a batch, until the half-close. Each prompt is answered at its commit; an empty one
// is refused.
grpc::Status BehaveInBatch(Stream* stream, std::map<uint32_t, Received>* received);

}  // namespace structkv::client
