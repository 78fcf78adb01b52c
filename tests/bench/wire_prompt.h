// Prompts in plan mode that the round trips are measured with: the worker's saliency in, positions
// out.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "grpcpp/channel.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::bench {

inline double MicrosSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
      .count();
}

// Of Llama-3.1-8B's attention, with the statistic SALIENCY.
v1::Open PlanOpen(uint32_t layers, uint32_t tokens);

// Pseudo-random, the same ones every time, in [0, 1).
std::vector<float> Saliency(size_t count);

struct Sample {
  std::vector<double> micros;  // of each layer
  uint64_t request_bytes = 0;  // of one layer
  uint64_t answer_bytes = 0;   // likewise, without the pivot
};

// One prompt, one layer after the other, each with the same `saliency` in pieces of `piece_bytes`,
// which divides it. Adds the microseconds of all but the first `warm_up` layers.
void CompressPrompt(const std::shared_ptr<grpc::Channel>& channel, const v1::Open& open,
                    absl::Span<const std::byte> saliency, uint64_t piece_bytes, uint32_t warm_up,
                    Sample* sample);

}  // namespace structkv::bench
