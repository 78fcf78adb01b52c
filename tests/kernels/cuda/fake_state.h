// What the parts of the fake CUDA runtime share.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

#include "tests/kernels/cuda/fake_runtime.h"

// Names that the runtime's headers declare.
struct CUstream_st {
  int device = 0;
  std::mutex mutex;
  std::deque<std::function<void()>> work;
  int64_t queued = 0;
  int64_t done = 0;
};
struct CUevent_st {
  cudaStream_t stream = nullptr;
  int64_t position = 0;  // work of the stream that lies before it
};

namespace structkv::testing::fake {

// A failure that is to come.
struct Failure {
  int64_t countdown = -1;
  cudaError_t error = cudaSuccess;

  cudaError_t Next() { return countdown >= 0 && countdown-- == 0 ? error : cudaSuccess; }
};

struct Allocation {
  int64_t bytes = 0;
  int device = 0;
};
using Allocations = std::map<std::byte*, Allocation>;

struct Runtime {
  std::mutex mutex;
  FakeGpus gpus;
  Allocations device_memory;
  Allocations pinned_memory;
  FakeHeld held;
  std::vector<int64_t> kernels;
  int64_t calls = 0;
  Failure call_failure, launch_failure, allocation_failure;
  cudaError_t count_error = cudaSuccess;
  cudaError_t sticky = cudaSuccess;
  int accesses = 0;  // of work that runs now
  std::function<void()> hook;
};
Runtime& The();

// The thread's own.
extern thread_local int current_device;
extern thread_local cudaError_t last_error;

[[noreturn]] void Die(const char* what);

// Notes the error, if it is one, and returns it. Under the mutex, as all that follow but Queue and
// RunUpTo.
cudaError_t Failed(cudaError_t error);
// At the begin of each call.
cudaError_t Enter();

bool IsDevice(const void* data, int64_t bytes);
// Of memory of a device.
int DeviceOf(const void* data);
bool IsPinned(const void* data, int64_t bytes);
int64_t TakenBytes(int device);

cudaError_t Queue(cudaStream_t stream, std::function<void()> work);
// Runs what lies before a place in the stream. What a lost device had to do is never done.
void RunUpTo(CUstream_st& stream, int64_t position);

}  // namespace structkv::testing::fake
