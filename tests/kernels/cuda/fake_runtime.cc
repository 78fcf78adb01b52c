#include "tests/kernels/cuda/fake_runtime.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <utility>

#include "kernels/cuda/cuda_error.h"
#include "tests/kernels/cuda/fake_state.h"

namespace structkv::testing {
namespace fake {

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

namespace {

bool IsIn(const Allocations& all, const void* data, int64_t bytes) {
  auto* at = static_cast<std::byte*>(const_cast<void*>(data));
  auto next = all.upper_bound(at);
  if (next == all.begin()) return false;
  --next;
  return at + bytes <= next->first + next->second.bytes;
}

// While work runs, device memory can be touched.
class Access {
 public:
  Access() { FakeCuda::BeginAccess(); }
  ~Access() { FakeCuda::EndAccess(); }
};

}  // namespace

Runtime& The() {
  static auto* const runtime = new Runtime();
  return *runtime;
}

void Die(const char* what) {
  std::fprintf(stderr, "fake CUDA runtime: %s\n", what);
  std::abort();
}

cudaError_t Failed(cudaError_t error) {
  if (cuda::IsSticky(error)) The().sticky = error;
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t Enter() {
  Runtime& r = The();
  ++r.calls;
  if (r.sticky != cudaSuccess) return Failed(r.sticky);
  return Failed(r.call_failure.Next());
}

void Protect(int protection) {
  for (const auto& [begin, allocation] : The().device_memory) {
    if (mprotect(begin, static_cast<size_t>(allocation.bytes), protection) != 0) Die("mprotect");
  }
}
int Protection() { return The().accesses > 0 ? PROT_READ | PROT_WRITE : PROT_NONE; }

bool IsDevice(const void* data, int64_t bytes) { return IsIn(The().device_memory, data, bytes); }
int DeviceOf(const void* data) {
  auto* at = static_cast<std::byte*>(const_cast<void*>(data));
  return std::prev(The().device_memory.upper_bound(at))->second.device;
}
bool IsPinned(const void* data, int64_t bytes) {
  return The().gpus.all_pinned || IsIn(The().pinned_memory, data, bytes) ||
         IsIn(The().registered_memory, data, bytes);
}
int64_t TakenBytes(int device) {
  int64_t taken = 0;
  for (const auto& [begin, allocation] : The().device_memory) {
    if (allocation.device == device && !allocation.file.imported()) taken += allocation.bytes;
  }
  return taken;
}

void RunUpTo(CUstream_st& stream, int64_t position) {
  const std::lock_guard lock(stream.mutex);
  if (stream.done >= position) return;
  const Access access;
  while (stream.done < position) {
    const CUstream_st::Work work = std::move(stream.work.front());
    stream.work.pop_front();
    ++stream.done;
    std::function<void()> hook;
    bool lost = false;
    {
      const std::lock_guard runtime(The().mutex);
      hook = The().hook;
      lost = The().sticky != cudaSuccess;
    }
    if (hook) hook();
    if (lost) continue;
    work.run();
    const std::lock_guard runtime(The().mutex);
    The().log.push_back(work.what);
  }
}

cudaError_t Queue(cudaStream_t stream, FakeWork::Kind kind, int64_t bytes,
                  std::function<void()> work) {
  if (stream == nullptr) Die("work on the default stream");
  if (stream->device != current_device) Die("work on a stream of another device");
  const std::lock_guard lock(stream->mutex);
  stream->work.push_back({{kind, stream, bytes}, std::move(work)});
  ++stream->queued;
  return cudaSuccess;
}

}  // namespace fake

using fake::current_device;
using fake::Die;
using fake::Enter;
using fake::Failed;
using fake::last_error;
using fake::Queue;
using fake::Runtime;
using fake::The;

void FakeCuda::Reset(const FakeGpus& gpus) {
  Runtime& r = The();
  const std::lock_guard lock(r.mutex);
  if (r.held != FakeHeld()) Die("something is held");
  if (!r.registered_memory.empty()) Die("some of the program's memory is still pinned");
  r.gpus = gpus;
  r.kernels.assign(static_cast<size_t>(gpus.count), 0);
  r.call_failure = r.launch_failure = r.allocation_failure = {};
  r.count_error = r.sticky = cudaSuccess;
  r.freed_while_open = 0;
  r.hook = nullptr;
  r.log.clear();
  last_error = cudaSuccess;
}

FakeHeld FakeCuda::held() {
  const std::lock_guard lock(The().mutex);
  return The().held;
}
int64_t FakeCuda::registered_bytes() {
  const std::lock_guard lock(The().mutex);
  int64_t bytes = 0;
  for (const auto& [begin, allocation] : The().registered_memory) bytes += allocation.bytes;
  return bytes;
}
int64_t FakeCuda::freed_while_open() {
  const std::lock_guard lock(The().mutex);
  return The().freed_while_open;
}
int64_t FakeCuda::calls() {
  const std::lock_guard lock(The().mutex);
  return The().calls;
}
void FakeCuda::FailCall(int64_t n, cudaError_t error) {
  const std::lock_guard lock(The().mutex);
  The().call_failure = {n, error};
}
void FakeCuda::FailLaunch(int64_t n, cudaError_t error) {
  const std::lock_guard lock(The().mutex);
  The().launch_failure = {n, error};
}
void FakeCuda::FailAllocation(int64_t n, cudaError_t error) {
  const std::lock_guard lock(The().mutex);
  The().allocation_failure = {n, error};
}
void FakeCuda::FailDeviceCount(cudaError_t error) {
  const std::lock_guard lock(The().mutex);
  The().count_error = error;
}
int64_t FakeCuda::kernels(int device) {
  const std::lock_guard lock(The().mutex);
  return The().kernels[static_cast<size_t>(device)];
}
std::vector<FakeWork> FakeCuda::TakeLog() {
  const std::lock_guard lock(The().mutex);
  return std::exchange(The().log, {});
}

void FakeCuda::SetHook(std::function<void()> hook) {
  const std::lock_guard lock(The().mutex);
  The().hook = std::move(hook);
}

void FakeCuda::SetBusy(bool (*busy)(cudaStream_t)) {
  const std::lock_guard lock(The().mutex);
  The().busy = busy;
}

void FakeCuda::BeginAccess() {
  const std::lock_guard lock(The().mutex);
  if (The().accesses++ == 0) fake::Protect(PROT_READ | PROT_WRITE);
}
void FakeCuda::EndAccess() {
  const std::lock_guard lock(The().mutex);
  if (--The().accesses == 0) fake::Protect(PROT_NONE);
}

cudaError_t FakeCuda::Launch(cudaStream_t stream, std::function<void()> work) {
  {
    const std::lock_guard lock(The().mutex);
    if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
    if (const cudaError_t error = Failed(The().launch_failure.Next()); error != cudaSuccess) {
      return error;
    }
    // A launcher asks for the last error, whoever left it.
    if (last_error != cudaSuccess) return std::exchange(last_error, cudaSuccess);
    ++The().kernels[static_cast<size_t>(current_device)];
  }
  return Queue(stream, FakeWork::Kind::kKernel, 0, std::move(work));
}

}  // namespace structkv::testing
