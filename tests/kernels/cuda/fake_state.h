// What the parts of the fake CUDA runtime share.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

#include "tests/kernels/cuda/fake_runtime.h"

namespace structkv::testing::fake {
// A file that processes map. Its last page says who it is and who else has it open.
struct SharedFile {
  struct Owner {
    uint64_t number;  // unlike that of any other file
    std::atomic<int32_t> importers;
  };

  int fd = -1;  // of the process that made it
  void* data = nullptr;
  int64_t bytes = 0;  // before the last page
  Owner* owner = nullptr;

  bool imported() const { return fd < 0; }
};
// What the processes that have an event share of it.
struct SharedEvent {
  std::atomic<int64_t> recorded;
  std::atomic<int64_t> reached;
};
}  // namespace structkv::testing::fake

// Names that the runtime's headers declare.
struct CUstream_st {
  struct Work {
    structkv::testing::FakeWork what;
    std::function<void()> run;
  };
  int device = 0;
  std::mutex mutex;
  std::deque<Work> work;
  int64_t queued = 0;
  int64_t done = 0;
};
struct CUevent_st {
  cudaStream_t stream = nullptr;
  int64_t position = 0;  // work of the stream that lies before it
  // Of an event between processes:
  structkv::testing::fake::SharedFile file;
  structkv::testing::fake::SharedEvent* shared = nullptr;  // at the file's begin
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
  SharedFile file;  // of a device's
};
using Allocations = std::map<std::byte*, Allocation>;

struct Runtime {
  std::mutex mutex;
  FakeGpus gpus;
  Allocations device_memory;
  Allocations pinned_memory;
  Allocations registered_memory;
  FakeHeld held;
  std::vector<int64_t> kernels;
  int64_t calls = 0;
  Failure call_failure, launch_failure, allocation_failure;
  cudaError_t count_error = cudaSuccess;
  cudaError_t sticky = cudaSuccess;
  int accesses = 0;  // of work that runs now
  int64_t freed_while_open = 0;
  std::function<void()> hook;
  std::vector<FakeWork> log;
  std::atomic<bool (*)(cudaStream_t)> busy = nullptr;
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

// Of device memory, now that work runs or does not.
int Protection();
// Gives all device memory that.
void Protect(int protection);

// A new file, mapped with that protection. Dies where that fails.
SharedFile MakeShared(int64_t bytes, int protection);
// Unmaps, and closes. Whether another process still has the file.
bool Drop(const SharedFile& file);

bool IsDevice(const void* data, int64_t bytes);
// The allocation in which a device's address lies. Locks the mutex itself.
CUresult AddressRange(CUdeviceptr* base, size_t* size, CUdeviceptr address);
// Of memory of a device.
int DeviceOf(const void* data);
bool IsPinned(const void* data, int64_t bytes);
int64_t TakenBytes(int device);

cudaError_t Queue(cudaStream_t stream, FakeWork::Kind kind, int64_t bytes,
                  std::function<void()> work);
// Runs what lies before a place in the stream. What a lost device had to do is never done.
void RunUpTo(CUstream_st& stream, int64_t position);

}  // namespace structkv::testing::fake
