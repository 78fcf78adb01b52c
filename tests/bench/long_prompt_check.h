// What a layer of a streamed prompt must keep, computed again by the reference backend from the
// source of its bytes, a KV head at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "structkv/v1/compression.pb.h"
#include "tests/bench/memory_stream.h"

namespace structkv::bench {

// How the positions that came differ from the reference's.
struct PositionCheck {
  int64_t kept = 0;
  int64_t different = 0;  // kept by one of the two alone, half of these
  // The farthest that the reference's score of such a token lies from the lowest score that it
  // keeps, as a share of that.
  double farthest = 0;
};

// The layer's S, [N], by the reference backend, with two threads. `open` is LlamaOpen's, with any
// output and the statistic WINDOW_QUERIES or SALIENCY; `window` is Opened.window_tokens.
std::vector<float> ReferenceSaliency(const v1::Open& open, uint32_t window,
                                     const TensorSource& source, uint32_t layer);

// Holds positions to what the reference backend selects by `saliency`.
PositionCheck CheckPositions(const std::vector<float>& saliency, uint32_t window,
                             const std::vector<int32_t>& positions);

}  // namespace structkv::bench
