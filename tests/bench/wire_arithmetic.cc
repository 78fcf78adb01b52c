#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/backend.h"
#include "kernels/backend_registry.h"
#include "tests/bench/wire_peer.h"
#include "tests/bench/wire_round_trip.h"

namespace structkv::bench {

RoundTrip MeasureArithmetic(uint32_t tokens, int layers) {
  using Clock = std::chrono::steady_clock;
  absl::StatusOr<std::unique_ptr<Backend>> backend = CreateBackend("auto");
  if (!backend.ok()) Die("no backend: " + std::string(backend.status().message()));
  std::vector<float> saliency(tokens);
  uint32_t state = 1;
  for (float& value : saliency) {
    state = state * 1664525 + 1013904223;
    value = static_cast<float>(state >> 8) / static_cast<float>(1 << 24);
  }
  std::vector<float> centrality(tokens);
  const int64_t keep = (tokens + 9) / 10;
  std::vector<int32_t> positions(static_cast<size_t>(keep));
  std::vector<double> micros;
  for (int i = 0; i < layers; ++i) {
    const Clock::time_point start = Clock::now();
    if ((*backend)->FindBad(saliency.data(), 1, tokens, SerialFor)) Die("a bad statistic");
    const SaliencySums sums = (*backend)->Sums(saliency.data(), tokens, keep, SerialFor);
    (*backend)->Accumulate(0.9F, saliency.data(), centrality.data(), tokens, SerialFor);
    (*backend)->Select({saliency.data(), tokens, 8, keep}, positions.data());
    const auto elapsed = Clock::now() - start;
    if (sums.total <= 0 || positions.back() != static_cast<int32_t>(tokens) - 1) {
      Die("the backend's answer is wrong");
    }
    micros.push_back(std::chrono::duration<double, std::micro>(elapsed).count());
  }
  return Summarise(std::move(micros));
}

}  // namespace structkv::bench
