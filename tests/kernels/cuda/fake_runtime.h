// A CUDA runtime without a GPU: the functions of cuda_runtime_api.h that kernels/cuda calls, those
// of the driver's that the client library looks up, and the launchers, which run the kernels' own
// code on emulated blocks. A program that is linked with it has as many GPUs as it likes.
//
// It is as slow as CUDA may be: what is queued on a stream runs when somebody waits for it, and no
// sooner. Device memory can be touched by what runs on streams alone; the host's touch is a
// segmentation fault. Copies abort the program where their host side is not pinned or their device
// side is not of one allocation, and so do launches from another device than the stream's.
//
// Device memory and events go from process to process (CUDA IPC) as long as the exporting one
// lives. As with CUDA nothing is opened in the process that exported it; opening it twice, which
// CUDA counts, aborts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace structkv::testing {

struct FakeGpus {
  int count = 1;
  int64_t memory_bytes = int64_t{512} << 20;  // of each
  int major = 9;                              // compute capability; clusters from 9 on
  bool all_pinned = false;                    // all of the host's memory counts as pinned
};

// What programs hold of the runtime.
struct FakeHeld {
  int64_t device_bytes = 0;
  int64_t pinned_bytes = 0;
  int64_t streams = 0;
  int64_t events = 0;
  int64_t imports = 0;   // allocations of other processes
  int64_t contexts = 0;  // uses of devices by way of the driver
  bool operator==(const FakeHeld&) const = default;
};

// A piece of work that a stream ran.
struct FakeWork {
  enum class Kind { kToDevice, kFromDevice, kWithinDevice, kSet, kKernel, kWait, kRecord };
  Kind kind;
  cudaStream_t stream;
  int64_t bytes;  // of copies and what is set
};

class FakeCuda {
 public:
  // Also ends every failure. Nothing may be held, nor any of the program's own memory pinned.
  static void Reset(const FakeGpus& gpus);
  static FakeHeld held();
  // Of the program's own memory, what is pinned now: a pool of buffers keeps it so while it is
  // idle.
  static int64_t registered_bytes();
  // Calls of the runtime so far; those that give something back or ask for errors do not count.
  static int64_t calls();
  // The n-th call from now on fails, 0 the next; where the error is a sticky one, all after it do.
  static void FailCall(int64_t n, cudaError_t error);
  // Likewise for launches, and for allocations of device or pinned memory and what pins the
  // program's own.
  static void FailLaunch(int64_t n, cudaError_t error);
  static void FailAllocation(int64_t n, cudaError_t error);
  // What cudaGetDeviceCount fails with, as without a driver.
  static void FailDeviceCount(cudaError_t error);
  // Kernels that ran on `device`.
  static int64_t kernels(int device);
  // Allocations that were freed while another process had them open, which is undefined with CUDA.
  static int64_t freed_while_open();
  // What streams have run since the last call, in the order in which it was done.
  static std::vector<FakeWork> TakeLog();
  // Called before each piece of work of a stream, on the thread that waits; null: nothing is.
  static void SetHook(std::function<void()> hook);

  // In between, any thread can touch device memory, as what runs on a stream does: for other
  // libraries that stand for a GPU's.
  static void BeginAccess();
  static void EndAccess();

  // Whether another library has work on a stream, which cuStreamQuery then tells; null: none has.
  // It waits for the stream by itself.
  static void SetBusy(bool (*busy)(cudaStream_t));

  // For the launchers: queues `work` on the stream.
  static cudaError_t Launch(cudaStream_t stream, std::function<void()> work);
};

}  // namespace structkv::testing
