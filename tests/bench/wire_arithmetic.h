// What the service computes for a layer whose saliency came, without a service around it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/backend.h"
#include "tests/bench/wire_round_trip.h"

namespace structkv::bench {

// Serially, on the calling thread: check, sums for the metrics, centrality, selection of a tenth.
// Made-up statistics; ends the program where the backend's answer is wrong.
class LayerArithmetic {
 public:
  explicit LayerArithmetic(uint32_t tokens);
  void Run();

 private:
  std::unique_ptr<Backend> backend_;
  std::vector<float> saliency_;
  std::vector<float> centrality_;
  std::vector<int32_t> positions_;
};

// Of `layers` runs, one straight after the other.
RoundTrip MeasureArithmetic(uint32_t tokens, int layers);

}  // namespace structkv::bench
