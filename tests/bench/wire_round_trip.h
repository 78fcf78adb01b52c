// Round trip of one layer's statistics and their answer.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "grpcpp/channel.h"

namespace structkv::bench {

struct RoundTrip {
  double p50_micros = 0;
  double p99_micros = 0;
};

// By nearest rank: of less than 100 the p99 is the longest. Not of none.
RoundTrip Summarise(std::vector<double> micros);

struct RoundTrips {
  // Compress: a layer's saliency of `tokens` float32 in plan mode, and the layer's answer.
  RoundTrip compress;
  // The bare service: a request and an answer of the same lengths.
  RoundTrip bare;
  // The same, with the arithmetic of such a layer between request and answer. A machine that rests
  // for that long takes longer to wake, so it is more than their sum.
  RoundTrip computing;
  // The bare service: the request sent back.
  RoundTrip echo;
  uint64_t request_bytes = 0;
  uint64_t answer_bytes = 0;
};

// `prompts` prompts of 512 layers on one connection each, in turns with the bare service.
RoundTrips MeasureRoundTrips(const std::string& bare_address, const std::string& address,
                             uint32_t tokens, int prompts);

// `count` round trips of a request and an answer of these lengths on one stream of the bare service
// (see wire_bare.h for `method` and `arithmetic_tokens`); adds the microseconds of all but the
// first `warm_up`.
void BareRoundTrips(const std::shared_ptr<grpc::Channel>& channel, const char* method,
                    uint64_t request_bytes, uint64_t answer_bytes, uint32_t arithmetic_tokens,
                    uint32_t count, uint32_t warm_up, std::vector<double>* micros);

}  // namespace structkv::bench
