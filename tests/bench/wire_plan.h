// Plan mode: what one layer's statistics cost on their way to its positions, beside the arithmetic.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/bench/wire_round_trip.h"

namespace structkv::bench {

// What a worker sends for a layer of Llama-3.1-8B, and what it gets back.
struct PlanCase {
  const char* name;
  bool per_head_statistic;  // [8, N] float32; otherwise [N]
  bool per_head_selection;  // [8, kept] positions; otherwise [kept]
};

struct PlanTimes {
  // From the first byte sent to the last byte of the layer's answer, all 32 layers of each prompt:
  // what is sent with the last one decides the pivot, whose skeleton comes as well.
  RoundTrip compress;
  // The same layers in an engine::Prompt in this process, with as many threads as the server would
  // use for them: check, metrics, centrality, selection, pivot.
  RoundTrip arithmetic;
  // The bare service: a request and an answer of the same lengths, and the request sent back.
  RoundTrip bare;
  RoundTrip echo;
  uint64_t request_bytes = 0;
  uint64_t answer_bytes = 0;
};

const std::vector<PlanCase>& PlanCases();

// `prompts` prompts of 32 layers of `tokens` tokens, in turns with the bare service and the engine.
// A layer's statistics go in pieces of `piece_bytes`, a message each.
PlanTimes MeasurePlan(const PlanCase& plan, const std::string& bare_address,
                      const std::string& address, uint32_t tokens, int prompts,
                      uint64_t piece_bytes);

}  // namespace structkv::bench
