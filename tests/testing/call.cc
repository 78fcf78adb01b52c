#include "tests/testing/call.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "grpc/grpc.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/impl/codegen/rpc_method.h"
#include "grpcpp/security/credentials.h"

namespace structkv::testkit {

std::shared_ptr<grpc::Channel> NewChannel(const std::string& target) {
  grpc_init();  // once more than it is given back: see Server::Start()
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  return grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
}

Call::Call(std::shared_ptr<grpc::Channel> channel, const CallOptions& options)
    : channel_(std::move(channel)) {
  context_.set_deadline(std::chrono::system_clock::now() + options.deadline);
  for (const auto& [key, value] : options.metadata) context_.AddMetadata(key, value);
  if (options.compression != GRPC_COMPRESS_NONE) {
    context_.set_compression_algorithm(options.compression);
  }
  const grpc::internal::RpcMethod method(options.method.c_str(),
                                         grpc::internal::RpcMethod::BIDI_STREAMING, channel_);
  stream_.reset(
      grpc::internal::ClientReaderWriterFactory<grpc::ByteBuffer, grpc::ByteBuffer>::Create(
          channel_.get(), method, &context_));
  if (options.read) StartReading();
}

Call::~Call() {
  if (finished_) return;
  context_.TryCancel();
  Finish();
}

bool Call::Send(const v1::CompressRequest& request) {
  return SendBytes(request.SerializeAsString());
}

bool Call::SendBytes(const std::string& bytes) {
  const grpc::Slice slice(bytes);
  return stream_->Write(grpc::ByteBuffer(&slice, 1));
}

void Call::HalfClose() { stream_->WritesDone(); }

void Call::Cancel() { context_.TryCancel(); }

void Call::StartReading() {
  if (!reader_.joinable()) reader_ = std::thread([this] { ReadAll(); });
}

void Call::ReadAll() {
  grpc::ByteBuffer buffer;
  while (stream_->Read(&buffer)) {
    grpc::Slice slice;
    v1::CompressResponse response;
    if (!buffer.DumpToSingleSlice(&slice).ok() ||
        !response.ParseFromArray(slice.begin(), static_cast<int>(slice.size()))) {
      response.Clear();  // no message set: nothing accepts it
    }
    const std::lock_guard lock(mutex_);
    responses_.push_back(std::move(response));
    changed_.notify_all();
  }
  const std::lock_guard lock(mutex_);
  ended_ = true;
  changed_.notify_all();
}

bool Call::WaitForResponses(size_t count) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return ended_ || responses_.size() >= count; });
  return responses_.size() >= count;
}

std::vector<v1::CompressResponse> Call::ResponsesFrom(size_t first) {
  const std::lock_guard lock(mutex_);
  return {responses_.begin() + static_cast<int64_t>(std::min(first, responses_.size())),
          responses_.end()};
}

std::optional<v1::Opened> Call::WaitForOpened() {
  if (!WaitForResponses(1)) return std::nullopt;
  const std::lock_guard lock(mutex_);
  if (!responses_[0].has_opened()) return std::nullopt;
  return responses_[0].opened();
}

bool Call::WaitForLayer(uint32_t layer) {
  std::unique_lock lock(mutex_);
  auto answered = [&] {
    return std::any_of(responses_.begin(), responses_.end(), [&](const auto& response) {
      return response.has_layer() && response.layer().layer() == layer &&
             response.layer().complete();
    });
  };
  changed_.wait(lock, [&] { return ended_ || answered(); });
  return answered();
}

std::optional<std::vector<int32_t>> Call::WaitForPull(uint32_t layer) {
  std::unique_lock lock(mutex_);
  std::string bytes;
  auto complete = [&] {
    bytes.clear();
    for (const v1::CompressResponse& response : responses_) {
      if (!response.has_pull() || response.pull().layer() != layer) continue;
      for (const v1::TensorPiece& piece : response.pull().pieces()) bytes += piece.data();
      if (response.pull().complete()) return true;
    }
    return false;
  };
  changed_.wait(lock, [&] { return complete() || ended_; });
  if (!complete()) return std::nullopt;
  std::vector<int32_t> positions(bytes.size() / sizeof(int32_t));
  std::memcpy(positions.data(), bytes.data(), positions.size() * sizeof(int32_t));
  return positions;
}

std::vector<int32_t> Call::Skeleton() {
  const std::lock_guard lock(mutex_);
  std::string bytes;
  bool complete = false;
  for (const v1::CompressResponse& response : responses_) {
    for (const v1::TensorPiece& piece : response.pivot().pieces()) {
      if (piece.tensor() == v1::TENSOR_SKELETON_POSITIONS) bytes += piece.data();
    }
    complete = complete || response.pivot().complete();
  }
  std::vector<int32_t> skeleton(complete ? bytes.size() / sizeof(int32_t) : 0);
  std::memcpy(skeleton.data(), bytes.data(), skeleton.size() * sizeof(int32_t));
  return skeleton;
}

Outcome Call::Finish() {
  StartReading();
  reader_.join();
  finished_ = true;
  Outcome outcome;
  outcome.status = stream_->Finish();
  outcome.responses = std::move(responses_);
  for (const auto& [key, value] : context_.GetServerTrailingMetadata()) {
    outcome.trailers.emplace(std::string(key.data(), key.size()),
                             std::string(value.data(), value.size()));
  }
  return outcome;
}

Outcome Run(const std::shared_ptr<grpc::Channel>& channel,
            const std::vector<v1::CompressRequest>& messages, const CallOptions& options) {
  Call call(channel, options);
  for (const v1::CompressRequest& message : messages) {
    if (!call.Send(message)) break;
  }
  call.HalfClose();
  return call.Finish();
}

}  // namespace structkv::testkit
