// Copies of a test's memory where a GPU's kernels can reach it.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/tensor.h"
#include "tests/gpu/device_data.h"

namespace structkv::gpu {

inline int64_t BlocksOf(const TensorView& view) {
  return (view.tokens + view.block_tokens - 1) / view.block_tokens;
}

// Bytes from a view's data to the end of its last vector, or block.
inline size_t Extent(const TensorView& view) {
  int64_t blocks = 1;
  int64_t tokens = view.tokens;
  if (view.paged()) {
    tokens = view.block_tokens;
    blocks = BlocksOf(view);
    if (view.block_table != nullptr) {
      blocks = *std::max_element(view.block_table, view.block_table + blocks) + 1;
    }
  }
  const int64_t last = (blocks - 1) * view.block_stride + (view.heads - 1) * view.head_stride +
                       (tokens - 1) * view.token_stride;
  return static_cast<size_t>(last + view.dim) * DTypeSize(view.dtype);
}

// Copies of host memory that are aligned as it is.
class Mirror {
 public:
  enum class Where : uint8_t { kDevice, kPinnedHost };

  explicit Mirror(Where where) : where_(where) {}
  ~Mirror() {
    for (const Part& part : parts_) {
      if (where_ == Where::kDevice) {
        cudaFree(part.base);
      } else {
        cudaFreeHost(part.base);
      }
    }
  }
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;

  // The copy of `count` things at `host`; null of null.
  template <class T>
  const T* In(const T* host, int64_t count = 1) {
    return static_cast<const T*>(Copy(host, nullptr, static_cast<size_t>(count) * sizeof(T)));
  }
  const void* In(const TensorView& view) { return Copy(view.data, nullptr, Extent(view)); }
  // The same; CopyBack writes it to the host's again.
  template <class T>
  T* InOut(T* host, int64_t count = 1) {
    return static_cast<T*>(Copy(host, host, static_cast<size_t>(count) * sizeof(T)));
  }

  // Waits for the device before.
  void CopyBack() const {
    OrDie(cudaDeviceSynchronize(), "kernel");
    for (const Part& part : parts_) {
      if (part.back == nullptr) continue;
      OrDie(cudaMemcpy(part.back, part.copy, part.bytes, cudaMemcpyDefault), "cudaMemcpy");
    }
  }

 private:
  static constexpr size_t kAlign = 256;
  struct Part {
    void* base;
    void* copy;
    void* back;
    size_t bytes;
  };

  void* Copy(const void* host, void* back, size_t bytes) {
    if (host == nullptr || bytes == 0) return nullptr;
    const size_t shift = reinterpret_cast<uintptr_t>(host) % kAlign;
    Part part = {nullptr, nullptr, back, bytes};
    if (where_ == Where::kDevice) {
      OrDie(cudaMalloc(&part.base, shift + bytes), "cudaMalloc");
    } else {
      OrDie(cudaHostAlloc(&part.base, shift + bytes, cudaHostAllocMapped), "cudaHostAlloc");
    }
    part.copy = static_cast<char*>(part.base) + shift;
    OrDie(cudaMemcpy(part.copy, host, bytes, cudaMemcpyDefault), "cudaMemcpy");
    parts_.push_back(part);
    return part.copy;
  }

  const Where where_;
  std::vector<Part> parts_;
};

}  // namespace structkv::gpu
