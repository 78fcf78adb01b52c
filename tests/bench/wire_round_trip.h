// Round trip of one layer's statistics and their answer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace structkv::bench {

struct RoundTrip {
  double p50_micros = 0;
  double p99_micros = 0;
};

RoundTrip Summarise(std::vector<double> micros);

struct RoundTrips {
  // Compress: a layer's saliency of `tokens` float32 in plan mode, and the layer's answer.
  RoundTrip compress;
  // The bare service: a request and an answer of the same lengths.
  RoundTrip bare;
  // The bare service: the request sent back.
  RoundTrip echo;
  uint64_t request_bytes = 0;
  uint64_t answer_bytes = 0;
};

// `prompts` prompts of 512 layers on one connection each, in turns with the bare service.
RoundTrips MeasureRoundTrips(const std::string& bare_address, const std::string& address,
                             uint32_t tokens, int prompts);

// What the backend computes for such a layer, called directly and serially in this process: check,
// sums for the metrics, centrality, selection.
RoundTrip MeasureArithmetic(uint32_t tokens, int layers);

}  // namespace structkv::bench
