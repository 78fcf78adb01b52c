// A backend that hands every call to another one, for those that change a few of them.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "kernels/backend.h"
#include "kernels/imported_memory.h"
#include "kernels/resident_vectors.h"

namespace structkv::testing {

class ForwardingBackend : public Backend {
 public:
  explicit ForwardingBackend(std::unique_ptr<Backend> real) : real_(std::move(real)) {}

  std::string_view name() const override { return real_->name(); }
  std::string device() const override { return real_->device(); }
  const BackendCapabilities& capabilities() const override { return real_->capabilities(); }
  absl::Status Health() const override { return real_->Health(); }
  bool KeepsHalfWeights(const SaliencyParams& params) const override {
    return real_->KeepsHalfWeights(params);
  }
  int64_t SaliencyScratchBytes(const SaliencyParams& params) const override {
    return real_->SaliencyScratchBytes(params);
  }
  absl::Status CheckRoom(const SaliencyParams& params, bool keys_on_device) const override {
    return real_->CheckRoom(params, keys_on_device);
  }
  absl::Status Saliency(const SaliencyParams& params, float* out, BadStatistic* bad,
                        ParallelFor parallel) const override {
    return real_->Saliency(params, out, bad, parallel);
  }
  void SumHeads(const float* per_head, int64_t heads, int64_t tokens, float* out,
                ParallelFor parallel) const override {
    real_->SumHeads(per_head, heads, tokens, out, parallel);
  }
  std::optional<BadStatistic> FindBad(const float* values, int64_t heads, int64_t tokens,
                                      ParallelFor parallel) const override {
    return real_->FindBad(values, heads, tokens, parallel);
  }
  void Pool(const float* in, int64_t tokens, Pooling pooling, int64_t kernel,
            float* out) const override {
    real_->Pool(in, tokens, pooling, kernel, out);
  }
  SaliencySums Sums(const float* scores, int64_t tokens, int64_t top_count,
                    ParallelFor parallel) const override {
    return real_->Sums(scores, tokens, top_count, parallel);
  }
  void Accumulate(float decay, const float* saliency, float* centrality, int64_t tokens,
                  ParallelFor parallel) const override {
    real_->Accumulate(decay, saliency, centrality, tokens, parallel);
  }
  void Select(const SelectParams& params, int32_t* positions) const override {
    real_->Select(params, positions);
  }
  absl::Status Gather(const TensorView& source, const int32_t* positions, bool per_head,
                      const MutableTensorView& destination, ParallelFor parallel) const override {
    return real_->Gather(source, positions, per_head, destination, parallel);
  }
  absl::Status GatherRotated(const TensorView& source, const int32_t* rows, bool per_head,
                             const RotationParams& rotation, const MutableTensorView& destination,
                             ParallelFor parallel) const override {
    return real_->GatherRotated(source, rows, per_head, rotation, destination, parallel);
  }
  absl::Status RunLayer(const LayerPass& pass, BadStatistic* bad,
                        ParallelFor parallel) const override {
    return real_->RunLayer(pass, bad, parallel);
  }
  std::unique_ptr<StagedLayer> Stage(const SaliencyParams& params, int gpu) const override {
    return real_->Stage(params, gpu);
  }
  std::unique_ptr<ResidentVectors> Resident(int64_t count, int64_t tokens, const void* keys,
                                            const StagedLayer* staged) const override {
    return real_->Resident(count, tokens, keys, staged);
  }
  HostPinning host_pinning() const override { return real_->host_pinning(); }
  absl::Status Zero(void* to, int64_t bytes) const override { return real_->Zero(to, bytes); }
  absl::Status Fill(void* to, int64_t bytes, FillRun fill) const override {
    return real_->Fill(to, bytes, fill);
  }
  BackendStats stats() const override { return real_->stats(); }
  absl::StatusOr<std::unique_ptr<ImportedMemory>> Import(
      const ExportedMemory& memory) const override {
    return real_->Import(memory);
  }

 protected:
  Backend& real() const { return *real_; }

 private:
  const std::unique_ptr<Backend> real_;
};

}  // namespace structkv::testing
