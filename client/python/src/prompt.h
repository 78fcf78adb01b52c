// What a prompt's tensors follow from, and which of a GPU's memory they may lie in.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "structkv/region.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::python {

// "cuda:N" or, of nothing, "cpu".
std::string DeviceName(std::optional<int> gpu);

// Regions of a GPU by where they lie. It holds none of them: it may die on any thread.
class GpuPlaces {
 public:
  // Once; of a region of the host nothing.
  void Add(const client::Region& region);
  bool empty() const { return places_.empty(); }
  size_t size() const { return places_.size(); }
  // The number of the GPU in whose region all of `bytes` lie; nullopt: in none.
  std::optional<int> Find(absl::Span<const std::byte> bytes) const;

 private:
  struct Place {
    const std::byte* data;
    size_t size;
    int gpu;
  };
  std::vector<Place> places_;
};

// `opened` is there once the prompt was admitted.
struct Prompt {
  v1::Open open;
  v1::Opened opened;
  // Of the stream's regions; none where they are of the host.
  GpuPlaces gpu;
  // One of them, which asks CUDA; null: there is none.
  std::shared_ptr<const client::Region> gpu_region;
  bool has_staging = false;

  // Why `bytes` of a tensor, in the memory of GPU `device`, cannot be sent; empty: they can. What
  // is let through is in a region, or known to the library as a GPU's: no thread of the host reads
  // it.
  std::string WhyNotFromGpu(v1::Tensor tensor, absl::Span<const std::byte> bytes, int device) const;
};

}  // namespace structkv::python
