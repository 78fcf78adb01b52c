// What a program that has loaded the fake runtime as a library, by its C interface, asks of it
// beside CUDA's own functions.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <string>

#include "tests/kernels/cuda/fake_runtime.h"

using structkv::testing::FakeCuda;
using structkv::testing::FakeHeld;

extern "C" {

// FakeCuda::Reset().
void structkv_fake_cuda_reset(int gpus) { FakeCuda::Reset({.count = gpus}); }

// The fields of FakeHeld, in order, and FakeCuda::freed_while_open().
void structkv_fake_cuda_held(int64_t* values) {
  const FakeHeld held = FakeCuda::held();
  const int64_t all[] = {
      held.device_bytes, held.pinned_bytes,           held.streams, held.events, held.imports,
      held.contexts,     FakeCuda::freed_while_open()};
  std::memcpy(values, all, sizeof(all));
}

// Copies `bytes` at once, whatever kind of memory they are in, as a kernel does.
void structkv_fake_cuda_copy(void* to, const void* from, uint64_t bytes) {
  FakeCuda::BeginAccess();
  std::memcpy(to, from, bytes);
  FakeCuda::EndAccess();
}

// A kernel on `stream` that writes `bytes` of the host's memory, as it is now, to a GPU's.
int structkv_fake_cuda_write(void* to, const void* from, uint64_t bytes, cudaStream_t stream) {
  const auto write = [to, data = std::string(static_cast<const char*>(from), bytes)] {
    std::memcpy(to, data.data(), data.size());
  };
  return FakeCuda::Launch(stream, write);
}

}  // extern "C"
