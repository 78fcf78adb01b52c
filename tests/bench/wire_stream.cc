#include "tests/bench/wire_stream.h"

#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "structkv/v1/compression.pb.h"
#include "structkv/v1/held_cache.grpc.pb.h"
#include "structkv/v1/piece_codec.h"
#include "tests/bench/wire_bare.h"
#include "tests/bench/wire_peer.h"

namespace structkv::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr char kFetchMethod[] = "/structkv.v1.HeldCaches/FetchCache";
// Beside a chunk in its message.
constexpr uint64_t kMessageSlack = 64 << 10;
constexpr uint32_t kLayers = 32;
constexpr uint32_t kKvHeads = 8;
constexpr uint32_t kDim = 128;
constexpr uint64_t kTokenBytes = kKvHeads * kDim * 2;  // of keys, or of values, in bf16

double Seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

// Memory that every chunk is sent from, touched once.
const std::vector<std::byte>& Source(uint64_t bytes) {
  static std::vector<std::byte> source;
  if (source.size() < bytes) source.assign(bytes, std::byte{0x3c});
  return source;
}

v1::Open FullOpen(const StreamOptions& options) {
  v1::Open open;
  open.mutable_geometry()->set_layer_count(kLayers);
  open.mutable_geometry()->set_query_head_count(32);
  open.mutable_geometry()->set_kv_head_count(kKvHeads);
  open.mutable_geometry()->set_key_dim(kDim);
  open.set_prompt_tokens(
      static_cast<uint32_t>(options.total_bytes / (uint64_t{2} * kLayers * kTokenBytes)));
  open.set_dtype(v1::DTYPE_BF16);
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  open.mutable_method()->mutable_full();
  // Answers come in messages of the same size.
  open.set_max_response_message_bytes(static_cast<uint32_t>(options.chunk_bytes + kMessageSlack));
  return open;
}

}  // namespace

double BareStreamSeconds(const std::string& address, const StreamOptions& options) {
  const auto channel = Connect(address);
  const std::vector<std::byte>& source = Source(options.chunk_bytes);
  grpc::ClientContext context;
  const auto stream = StartStream(channel, kEchoMethod, &context);
  const grpc::Slice slice(source.data(), options.chunk_bytes, grpc::Slice::STATIC_SLICE);
  const grpc::ByteBuffer message(&slice, 1);
  grpc::ByteBuffer first;  // the connection is up, the server has a thread for us
  if (!stream->Write(message) || !stream->Read(&first)) FinishOrDie(stream.get(), "bare stream");

  const Clock::time_point start = Clock::now();
  std::thread sender([&] {
    for (uint64_t sent = 0; sent < options.total_bytes; sent += options.chunk_bytes) {
      if (!stream->Write(message)) return;
    }
    stream->WritesDone();
  });
  uint64_t received = 0;
  for (grpc::ByteBuffer buffer; stream->Read(&buffer);) received += buffer.Length();
  sender.join();
  FinishOrDie(stream.get(), "bare stream");
  const double seconds = Seconds(Clock::now() - start);
  if (received < options.total_bytes) Die("bare stream: bytes are missing");
  return seconds;
}

namespace {

// Sends all of a prompt, and reads to the end. Seconds; bytes of keys and values that came back.
double RunPrompt(const std::string& address, const v1::Open& open, const StreamOptions& options,
                 uint64_t* received, v1::Summary* summary) {
  const auto channel = Connect(address);
  const uint64_t tensor_bytes = open.prompt_tokens() * kTokenBytes;
  const std::vector<std::byte>& source = Source(options.chunk_bytes);
  // The source outlives every message, which is sent from it uncopied, as the bare stream's.
  const wire::Keepalive owner(&source, [](const void*) {});
  grpc::ClientContext context;
  const auto stream = StartStream(channel, kCompressMethod, &context);
  v1::CompressRequest request;
  *request.mutable_open() = open;
  grpc::ByteBuffer opened;
  if (!stream->Write(wire::Encode(request)) || !stream->Read(&opened)) {
    FinishOrDie(stream.get(), "Compress");
    Die("Compress: not opened");
  }

  const Clock::time_point start = Clock::now();
  std::thread sender([&] {
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      for (const v1::Tensor tensor : {v1::TENSOR_KEYS, v1::TENSOR_VALUES}) {
        for (uint64_t at = 0; at < tensor_bytes; at += options.chunk_bytes) {
          wire::OutgoingPiece piece;
          piece.layer = layer;
          piece.tensor = tensor;
          piece.offset_bytes = at;
          piece.data =
              absl::MakeConstSpan(source).first(std::min(options.chunk_bytes, tensor_bytes - at));
          piece.owner = owner;
          if (!stream->Write(wire::EncodeRequest({&piece, 1}))) return;
        }
      }
    }
    v1::CompressRequest commit;
    commit.mutable_commit()->set_layer_count(kLayers);
    commit.mutable_commit()->set_input_bytes(2 * tensor_bytes * kLayers);
    stream->Write(wire::Encode(commit));
    stream->WritesDone();
  });
  bool complete = false;
  for (grpc::ByteBuffer buffer; stream->Read(&buffer);) {
    absl::StatusOr<wire::Response> response = wire::DecodeResponse(buffer);
    if (!response.ok()) Die("Compress: an answer cannot be read");
    if (response->message.has_summary()) {
      complete = true;
      *summary = response->message.summary();
    }
    for (const wire::Piece& piece : response->pieces.pieces) {
      if (piece.tensor != v1::TENSOR_POSITIONS) *received += piece.size_bytes();
    }
  }
  sender.join();
  FinishOrDie(stream.get(), "Compress");
  const double seconds = Seconds(Clock::now() - start);
  if (!complete) Die("Compress: there is no summary");
  return seconds;
}

// Sends `requests` messages of `request_bytes`, each of which is answered with `answer_bytes`.
double BareOneWaySeconds(const std::string& address, uint64_t requests, uint64_t request_bytes,
                         uint64_t answer_bytes) {
  const auto channel = Connect(address);
  grpc::ClientContext context;
  context.AddMetadata(kAnswerBytesKey, std::to_string(answer_bytes));
  const auto stream = StartStream(channel, kAnswerMethod, &context);
  const grpc::Slice slice(Source(request_bytes).data(), request_bytes, grpc::Slice::STATIC_SLICE);
  const grpc::ByteBuffer message(&slice, 1);
  grpc::ByteBuffer first;  // the connection is up, the server has a thread for us
  if (!stream->Write(message) || !stream->Read(&first)) FinishOrDie(stream.get(), "bare stream");

  const Clock::time_point start = Clock::now();
  std::thread sender([&] {
    for (uint64_t i = 0; i < requests; ++i) {
      if (!stream->Write(message)) return;
    }
    stream->WritesDone();
  });
  uint64_t received = 0;
  for (grpc::ByteBuffer buffer; stream->Read(&buffer);) received += buffer.Length();
  sender.join();
  FinishOrDie(stream.get(), "bare stream");
  const double seconds = Seconds(Clock::now() - start);
  if (received != requests * answer_bytes) Die("bare stream: bytes are missing");
  return seconds;
}

constexpr uint64_t kSmallMessage = 64;

}  // namespace

double CompressStreamSeconds(const std::string& address, const StreamOptions& options) {
  const v1::Open open = FullOpen(options);
  uint64_t received = 0;
  v1::Summary summary;
  const double seconds = RunPrompt(address, open, options, &received, &summary);
  if (received != 2 * kTokenBytes * open.prompt_tokens() * kLayers) {
    Die("Compress: bytes are missing");
  }
  return seconds;
}

double BareUploadSeconds(const std::string& address, const StreamOptions& options) {
  return BareOneWaySeconds(address, options.total_bytes / options.chunk_bytes, options.chunk_bytes,
                           kSmallMessage);
}

double BareDownloadSeconds(const std::string& address, const StreamOptions& options) {
  return BareOneWaySeconds(address, options.total_bytes / options.chunk_bytes, kSmallMessage,
                           options.chunk_bytes);
}

double SendSeconds(const std::string& address, const StreamOptions& options) {
  v1::Open open = FullOpen(options);
  open.mutable_method()->mutable_streaming_llm()->mutable_kv_budget()->set_ratio(1e-6);
  uint64_t received = 0;
  v1::Summary summary;
  const double seconds = RunPrompt(address, open, options, &received, &summary);
  if (received == 0 || received > options.total_bytes / 100) Die("Compress: not a few tokens");
  return seconds;
}

double HoldSeconds(const std::string& address, const StreamOptions& options, std::string* handle) {
  v1::Open open = FullOpen(options);
  open.set_output(v1::OUTPUT_HOLD);
  uint64_t received = 0;
  v1::Summary summary;
  const double seconds = RunPrompt(address, open, options, &received, &summary);
  if (received != 0 || !summary.has_held()) Die("Compress: nothing is held");
  *handle = summary.held().handle();
  return seconds;
}

double FetchSeconds(const std::string& address, const StreamOptions& options,
                    const std::string& handle) {
  const auto channel = Connect(address);
  const auto stub = v1::HeldCaches::NewStub(channel);
  {
    grpc::ClientContext context;  // the connection is up
    v1::RenewCacheRequest request;
    request.set_handle(handle);
    v1::RenewCacheResponse response;
    if (!stub->RenewCache(&context, request, &response).ok()) Die("RenewCache failed");
  }
  v1::FetchCacheRequest request;
  request.set_handle(handle);
  request.set_max_response_message_bytes(
      static_cast<uint32_t>(options.chunk_bytes + kMessageSlack));
  grpc::ClientContext context;
  const Clock::time_point start = Clock::now();
  const auto stream = StartStream(channel, kFetchMethod, &context);
  stream->Write(wire::Encode(request));
  stream->WritesDone();
  uint64_t received = 0;
  bool complete = false;
  for (grpc::ByteBuffer buffer; stream->Read(&buffer);) {
    absl::StatusOr<wire::FetchResponse> response = wire::DecodeFetchResponse(buffer);
    if (!response.ok()) Die("FetchCache: a message cannot be read");
    complete = complete || response->message.has_summary();
    for (const wire::Piece& piece : response->pieces.pieces) {
      if (piece.tensor != v1::TENSOR_POSITIONS) received += piece.size_bytes();
    }
  }
  FinishOrDie(stream.get(), "FetchCache");
  const double seconds = Seconds(Clock::now() - start);
  const uint64_t tensor_bytes = FullOpen(options).prompt_tokens() * kTokenBytes;
  if (!complete || received != 2 * tensor_bytes * kLayers) Die("FetchCache: bytes are missing");
  grpc::ClientContext release_context;
  v1::ReleaseCacheRequest release;
  release.set_handle(handle);
  v1::ReleaseCacheResponse released;
  if (!stub->ReleaseCache(&release_context, release, &released).ok()) Die("ReleaseCache failed");
  return seconds;
}

}  // namespace structkv::bench
