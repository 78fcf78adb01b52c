#include "kernels/resident_vectors.h"

#include <algorithm>
#include <vector>

namespace structkv {
namespace {

class Vectors final : public ResidentVectors {
 public:
  Vectors(int64_t count, int64_t tokens, const Backend& backend)
      : tokens_(tokens), backend_(backend), vectors_(static_cast<size_t>(count)) {}

  int gpu() const override { return -1; }

  absl::Status Add(const ResidentPlace& to, const float* values, ParallelFor parallel) override {
    if (to.decay.has_value()) {
      backend_.Accumulate(*to.decay, values, At(to.vector).data(), tokens_, parallel);
    } else {
      At(to.vector).assign(values, values + tokens_);
    }
    return absl::OkStatus();
  }
  absl::Status Fold(int64_t to, float decay, absl::Span<const int64_t> from,
                    ParallelFor parallel) override {
    for (const int64_t each : from) {
      backend_.Accumulate(decay, At(each).data(), At(to).data(), tokens_, parallel);
    }
    return absl::OkStatus();
  }
  absl::Status Select(int64_t vector, const SelectParams& params,
                      int32_t* positions) const override {
    SelectParams of_vector = params;
    of_vector.scores = At(vector).data();
    backend_.Select(of_vector, positions);
    return absl::OkStatus();
  }
  absl::Status Read(int64_t vector, float* values) const override {
    std::copy(At(vector).begin(), At(vector).end(), values);
    return absl::OkStatus();
  }
  void Drop(int64_t vector) override { At(vector) = std::vector<float>(); }

 private:
  std::vector<float>& At(int64_t vector) { return vectors_[static_cast<size_t>(vector)]; }
  const std::vector<float>& At(int64_t vector) const {
    return vectors_[static_cast<size_t>(vector)];
  }

  const int64_t tokens_;
  const Backend& backend_;
  std::vector<std::vector<float>> vectors_;
};

}  // namespace

std::unique_ptr<ResidentVectors> HostVectors(int64_t count, int64_t tokens,
                                             const Backend& backend) {
  return std::make_unique<Vectors>(count, tokens, backend);
}

std::unique_ptr<ResidentVectors> Backend::Resident(int64_t count, int64_t tokens,
                                                   const void* /*keys*/,
                                                   const StagedLayer* /*staged*/) const {
  return HostVectors(count, tokens, *this);
}

}  // namespace structkv
