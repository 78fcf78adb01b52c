#include "tests/bench/wire_round_trip.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <utility>

#include "structkv/v1/compression.pb.h"
#include "tests/bench/wire_bare.h"
#include "tests/bench/wire_peer.h"
#include "tests/bench/wire_prompt.h"

namespace structkv::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kLayers = 512;
constexpr uint32_t kWarmUp = 32;  // first round trips of a stream, left out

}  // namespace

void BareRoundTrips(const std::shared_ptr<grpc::Channel>& channel, const char* method,
                    uint64_t request_bytes, uint64_t answer_bytes, uint32_t arithmetic_tokens,
                    uint32_t count, uint32_t warm_up, std::vector<double>* micros) {
  grpc::ClientContext context;
  context.AddMetadata(kArithmeticTokensKey, std::to_string(arithmetic_tokens));
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
    return micros[static_cast<size_t>(std::ceil(share * static_cast<double>(micros.size()))) - 1];
  };
  return {at(0.5), at(0.99)};
}

RoundTrips MeasureRoundTrips(const std::string& bare_address, const std::string& address,
                             uint32_t tokens, int prompts) {
  const auto bare_channel = Connect(bare_address);
  const auto channel = Connect(address);
  const std::vector<float> values = Saliency(tokens);
  const auto saliency = absl::MakeConstSpan(reinterpret_cast<const std::byte*>(values.data()),
                                            values.size() * sizeof(float));
  const v1::Open open = PlanOpen(kLayers, tokens);
  Sample compress;
  std::vector<double> bare;
  std::vector<double> computing;
  std::vector<double> echo;
  for (int i = 0; i < prompts; ++i) {
    CompressPrompt(channel, open, saliency, saliency.size(), kWarmUp, &compress);
    for (const auto& [arithmetic_tokens, micros] :
         {std::pair(uint32_t{0}, &bare), std::pair(tokens, &computing)}) {
      BareRoundTrips(bare_channel, kAnswerMethod, compress.request_bytes, compress.answer_bytes,
                     arithmetic_tokens, kLayers, kWarmUp, micros);
    }
    BareRoundTrips(bare_channel, kEchoMethod, compress.request_bytes, 0, 0, kLayers, kWarmUp,
                   &echo);
  }
  RoundTrips result;
  result.compress = Summarise(std::move(compress.micros));
  result.bare = Summarise(std::move(bare));
  result.computing = Summarise(std::move(computing));
  result.echo = Summarise(std::move(echo));
  result.request_bytes = compress.request_bytes;
  result.answer_bytes = compress.answer_bytes;
  return result;
}

}  // namespace structkv::bench
