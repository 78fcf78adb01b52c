#include "tests/bench/wire_arithmetic.h"

#include <chrono>

#include "kernels/backend_registry.h"
#include "tests/bench/wire_peer.h"
#include "tests/bench/wire_prompt.h"

namespace structkv::bench {

LayerArithmetic::LayerArithmetic(uint32_t tokens)
    : saliency_(Saliency(tokens)), centrality_(tokens), positions_((tokens + 9) / 10) {
  absl::StatusOr<std::unique_ptr<Backend>> backend = CreateBackend("auto");
  if (!backend.ok()) Die("no backend: " + std::string(backend.status().message()));
  backend_ = *std::move(backend);
}

void LayerArithmetic::Run() {
  const auto tokens = static_cast<int64_t>(saliency_.size());
  const auto keep = static_cast<int64_t>(positions_.size());
  if (backend_->FindBad(saliency_.data(), 1, tokens, SerialFor)) Die("a bad statistic");
  const SaliencySums sums = backend_->Sums(saliency_.data(), tokens, keep, SerialFor);
  backend_->Accumulate(0.9F, saliency_.data(), centrality_.data(), tokens, SerialFor);
  backend_->Select({saliency_.data(), tokens, 8, keep}, positions_.data());
  if (sums.total <= 0 || positions_.back() != static_cast<int32_t>(tokens) - 1) {
    Die("the backend's answer is wrong");
  }
}

RoundTrip MeasureArithmetic(uint32_t tokens, int layers) {
  LayerArithmetic arithmetic(tokens);
  std::vector<double> micros;
  for (int i = 0; i < layers; ++i) {
    const std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
    arithmetic.Run();
    micros.push_back(MicrosSince(start));
  }
  return Summarise(std::move(micros));
}

}  // namespace structkv::bench
