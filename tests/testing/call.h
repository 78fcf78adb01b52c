// One `Compress` stream over the public API alone: messages as bytes or plain generated protobuf,
// in whatever order a test wants, and everything that comes back. Shares nothing with client/cpp.
#pragma once

#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/sync_stream.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::testkit {

// A channel of its own connection, that accepts messages of any size.
std::shared_ptr<grpc::Channel> NewChannel(const std::string& target);

struct CallOptions {
  std::chrono::milliseconds deadline = std::chrono::seconds(60);
  grpc_compression_algorithm compression = GRPC_COMPRESS_NONE;
  // Whether answers are read as they come; otherwise from StartReading() on.
  bool read = true;
  std::vector<std::pair<std::string, std::string>> metadata;
  std::string method = "/structkv.v1.Compression/Compress";
};

// How a stream ended.
struct Outcome {
  grpc::Status status;
  std::vector<v1::CompressResponse> responses;
  std::map<std::string, std::string> trailers;
};

// Sends from one thread; the answers are read on another.
class Call {
 public:
  explicit Call(std::shared_ptr<grpc::Channel> channel, const CallOptions& options = {});
  // Cancels what still runs.
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // False once the stream is dead.
  bool Send(const v1::CompressRequest& request);
  bool SendBytes(const std::string& bytes);
  void HalfClose();
  void Cancel();
  void StartReading();

  // Waits until `count` answers came, or the stream ended; true in the first case.
  bool WaitForResponses(size_t count);
  // The answers that came so far, from the `first` on.
  std::vector<v1::CompressResponse> ResponsesFrom(size_t first);
  // Waits for `opened`, and returns it; nullopt where the stream ended without.
  std::optional<v1::Opened> WaitForOpened();
  // Waits until `layer` was answered completely; false where the stream ended without.
  bool WaitForLayer(uint32_t layer);
  // Waits until all of a layer's pull came, and returns its positions; nullopt where the stream
  // ended without.
  std::optional<std::vector<int32_t>> WaitForPull(uint32_t layer);
  // The skeleton, where the pivot has come; empty otherwise.
  std::vector<int32_t> Skeleton();
  // Waits for the end of the stream. Once.
  Outcome Finish();

 private:
  void ReadAll();

  std::shared_ptr<grpc::Channel> channel_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>> stream_;
  std::thread reader_;
  bool finished_ = false;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<v1::CompressResponse> responses_;  // under mutex_
  bool ended_ = false;                           // under mutex_
};

// Sends the messages, half-closes, and waits for the end.
Outcome Run(const std::shared_ptr<grpc::Channel>& channel,
            const std::vector<v1::CompressRequest>& messages, const CallOptions& options = {});

}  // namespace structkv::testkit
