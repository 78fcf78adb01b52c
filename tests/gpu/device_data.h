// Memory of a GPU for tests and benchmarks, which end where CUDA fails.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

namespace structkv::gpu {

inline void OrDie(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Why no GPU can be used; empty: one can. Any error means none.
inline std::string WhyNoGpu() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return std::string("no GPU: ") + cudaGetErrorString(error);
  return count > 0 ? "" : "no GPU";
}

// Bytes of the current device, aligned to 256.
class DeviceBytes {
 public:
  explicit DeviceBytes(size_t size) : size_(size) {
    if (size > 0) OrDie(cudaMalloc(&data_, size), "cudaMalloc");
  }
  // With a copy of the host's.
  DeviceBytes(const void* from, size_t size) : DeviceBytes(size) {
    if (size > 0) OrDie(cudaMemcpy(data_, from, size, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  DeviceBytes(DeviceBytes&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  DeviceBytes& operator=(DeviceBytes&&) = delete;
  ~DeviceBytes() { cudaFree(data_); }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t size() const { return size_; }
  void CopyTo(void* to, size_t size) const {
    OrDie(cudaMemcpy(to, data_, size, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace structkv::gpu
