#include "tests/bench/wire_round_trip.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>

#include "structkv/v1/compression.pb.h"
#include "structkv/v1/piece_codec.h"
#include "tests/bench/wire_bare.h"
#include "tests/bench/wire_peer.h"

namespace structkv::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kLayers = 512;
constexpr uint32_t kWarmUp = 32;  // first round trips of a stream, left out

double MicrosSince(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

v1::Open PlanOpen(uint32_t tokens) {
  v1::Open open;
  open.mutable_geometry()->set_layer_count(kLayers);
  open.mutable_geometry()->set_query_head_count(32);
  open.mutable_geometry()->set_kv_head_count(8);
  open.mutable_geometry()->set_key_dim(128);
  open.set_prompt_tokens(tokens);
  open.set_dtype(v1::DTYPE_BF16);
  open.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  open.set_statistic(v1::STATISTIC_SALIENCY);
  open.set_output(v1::OUTPUT_PLAN);
  return open;
}

std::vector<float> Saliency(uint32_t tokens) {
  std::vector<float> saliency(tokens);
  uint32_t state = 1;
  for (float& value : saliency) {
    state = state * 1664525 + 1013904223;
    value = static_cast<float>(state >> 8) / static_cast<float>(1 << 24);
  }
  return saliency;
}

struct Sample {
  std::vector<double> micros;
  uint64_t request_bytes = 0;
  uint64_t answer_bytes = 0;
};

// One prompt, one layer after the other.
void CompressPrompt(const std::shared_ptr<grpc::Channel>& channel, uint32_t tokens,
                    const std::vector<float>& saliency, Sample* sample) {
  grpc::ClientContext context;
  const auto stream = StartStream(channel, kCompressMethod, &context);
  v1::CompressRequest request;
  *request.mutable_open() = PlanOpen(tokens);
  grpc::ByteBuffer answer;
  if (!stream->Write(wire::Encode(request)) || !stream->Read(&answer)) {
    FinishOrDie(stream.get(), "Compress");
    Die("Compress: not opened");
  }
  const wire::Keepalive owner(&saliency, [](const void*) {});
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    wire::OutgoingPiece piece;
    piece.owner = owner;
    piece.layer = layer;
    piece.tensor = v1::TENSOR_SALIENCY;
    piece.data = absl::MakeConstSpan(reinterpret_cast<const std::byte*>(saliency.data()),
                                     saliency.size() * sizeof(float));
    const Clock::time_point start = Clock::now();
    const grpc::ByteBuffer message = wire::EncodeRequest({&piece, 1});
    if (!stream->Write(message) || !stream->Read(&answer)) FinishOrDie(stream.get(), "Compress");
    absl::StatusOr<wire::Response> response = wire::DecodeResponse(answer);
    // The pivot comes before the last layer's answer, in as many messages as it needs.
    while (response.ok() && response->message.has_pivot()) {
      if (!stream->Read(&answer)) FinishOrDie(stream.get(), "Compress");
      response = wire::DecodeResponse(answer);
    }
    const double micros = MicrosSince(start);
    if (!response.ok() || !response->message.layer().complete()) Die("Compress: no layer's answer");
    if (layer >= kWarmUp) sample->micros.push_back(micros);
    sample->request_bytes = message.Length();
    sample->answer_bytes = answer.Length();
  }
  v1::CompressRequest commit;
  commit.mutable_commit()->set_layer_count(kLayers);
  commit.mutable_commit()->set_input_bytes(uint64_t{kLayers} * tokens * sizeof(float));
  stream->Write(wire::Encode(commit));
  stream->WritesDone();
  while (stream->Read(&answer)) {
  }
  FinishOrDie(stream.get(), "Compress");
}

}  // namespace

void BareRoundTrips(const std::shared_ptr<grpc::Channel>& channel, const char* method,
                    uint64_t request_bytes, uint64_t answer_bytes, uint32_t count, uint32_t warm_up,
                    std::vector<double>* micros) {
  grpc::ClientContext context;
  context.AddMetadata(kAnswerBytesKey, std::to_string(answer_bytes));
  const auto stream = StartStream(channel, method, &context);
  const std::string data(request_bytes, 'b');
  grpc::ByteBuffer answer;
  for (uint32_t i = 0; i < count; ++i) {
    const Clock::time_point start = Clock::now();
    const grpc::Slice slice(data.data(), data.size(), grpc::Slice::STATIC_SLICE);
    if (!stream->Write(grpc::ByteBuffer(&slice, 1)) || !stream->Read(&answer)) {
      FinishOrDie(stream.get(), "bare service");
    }
    if (i >= warm_up) micros->push_back(MicrosSince(start));
  }
  stream->WritesDone();
  FinishOrDie(stream.get(), "bare service");
}

RoundTrip Summarise(std::vector<double> micros) {
  std::sort(micros.begin(), micros.end());
  auto at = [&](double share) {
    return micros[static_cast<size_t>(std::floor(share * static_cast<double>(micros.size() - 1)))];
  };
  return {at(0.5), at(0.99)};
}

RoundTrips MeasureRoundTrips(const std::string& bare_address, const std::string& address,
                             uint32_t tokens, int prompts) {
  const auto bare_channel = Connect(bare_address);
  const auto channel = Connect(address);
  const std::vector<float> saliency = Saliency(tokens);
  Sample compress;
  std::vector<double> bare;
  std::vector<double> echo;
  for (int i = 0; i < prompts; ++i) {
    CompressPrompt(channel, tokens, saliency, &compress);
    BareRoundTrips(bare_channel, kAnswerMethod, compress.request_bytes, compress.answer_bytes,
                   kLayers, kWarmUp, &bare);
    BareRoundTrips(bare_channel, kEchoMethod, compress.request_bytes, 0, kLayers, kWarmUp, &echo);
  }
  RoundTrips result;
  result.compress = Summarise(std::move(compress.micros));
  result.bare = Summarise(std::move(bare));
  result.echo = Summarise(std::move(echo));
  result.request_bytes = compress.request_bytes;
  result.answer_bytes = compress.answer_bytes;
  return result;
}

}  // namespace structkv::bench
