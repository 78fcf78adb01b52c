// Vectors of a number per token that a prompt goes on with from layer to layer and that stay where
// its layers are computed: StructKV's centrality, and the saliency of layers that it may yet need.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/backend.h"

namespace structkv {

// A vector, and what becomes of it where values go there: the values or, with a decay, decay * it +
// the values.
struct ResidentPlace {
  int64_t vector = 0;
  std::optional<float> decay;
};

// `count` vectors of [tokens] float32, by index; what one holds is unspecified until it was written
// without a decay, and after Drop(). For one thread at a time; does not outlive its backend, which
// made it (Backend::Resident). Errors are those of Backend, and leave the vectors unspecified.
class ResidentVectors {
 public:
  virtual ~ResidentVectors() = default;

  // The GPU that they lie on, by CUDA's number; RunLayer can then write them. -1: in the host's
  // memory.
  virtual int gpu() const = 0;

  // `values` is [tokens], the host's.
  virtual absl::Status Add(const ResidentPlace& to, const float* values, ParallelFor parallel) = 0;
  // Vector `to` becomes decay * it + vector `each`, for each of `from` in turn.
  virtual absl::Status Fold(int64_t to, float decay, absl::Span<const int64_t> from,
                            ParallelFor parallel) = 0;
  // Backend::Select of a vector's scores; the params have none.
  virtual absl::Status Select(int64_t vector, const SelectParams& params,
                              int32_t* positions) const = 0;
  // Copies a vector to `values`, [tokens], the host's.
  virtual absl::Status Read(int64_t vector, float* values) const = 0;
  // What the vector holds is not wanted any more.
  virtual void Drop(int64_t vector) = 0;
};

// In the host's memory, each as soon as it is written; `backend` computes, and outlives them.
std::unique_ptr<ResidentVectors> HostVectors(int64_t count, int64_t tokens, const Backend& backend);

}  // namespace structkv
