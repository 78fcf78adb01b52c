#include "tests/kernels/cuda/fake_runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_error.h"

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

namespace structkv::testing {
namespace {

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

struct Runtime {
  std::mutex mutex;
  FakeGpus gpus;
  std::map<std::byte*, Allocation> device_memory;
  std::map<std::byte*, int64_t> pinned_memory;
  FakeHeld held;
  std::vector<int64_t> kernels;
  int64_t calls = 0;
  Failure call_failure, launch_failure, allocation_failure;
  cudaError_t count_error = cudaSuccess;
  cudaError_t sticky = cudaSuccess;
  int accesses = 0;  // of work that runs now
  std::function<void()> hook;
};

Runtime& The() {
  static auto* const runtime = new Runtime();
  return *runtime;
}

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

[[noreturn]] void Die(const char* what) {
  std::fprintf(stderr, "fake CUDA runtime: %s\n", what);
  std::abort();
}

cudaError_t Failed(cudaError_t error) {
  if (cuda::IsSticky(error)) The().sticky = error;
  if (error != cudaSuccess) last_error = error;
  return error;
}

// At the begin of each call, under the mutex.
cudaError_t Enter() {
  Runtime& r = The();
  ++r.calls;
  if (r.sticky != cudaSuccess) return Failed(r.sticky);
  return Failed(r.call_failure.Next());
}

template <class Map>
bool IsIn(const Map& map, const void* data, int64_t bytes, auto size_of) {
  auto* at = static_cast<std::byte*>(const_cast<void*>(data));
  auto next = map.upper_bound(at);
  if (next == map.begin()) return false;
  --next;
  return at + bytes <= next->first + size_of(next->second);
}
bool IsDevice(const void* data, int64_t bytes) {
  return IsIn(The().device_memory, data, bytes, [](const Allocation& a) { return a.bytes; });
}
bool IsPinned(const void* data, int64_t bytes) {
  return The().gpus.all_pinned ||
         IsIn(The().pinned_memory, data, bytes, [](int64_t size) { return size; });
}

void Protect(int protection) {
  for (const auto& [begin, allocation] : The().device_memory) {
    if (mprotect(begin, static_cast<size_t>(allocation.bytes), protection) != 0) Die("mprotect");
  }
}

// While work runs, device memory can be touched.
class Access {
 public:
  Access() {
    const std::lock_guard lock(The().mutex);
    if (The().accesses++ == 0) Protect(PROT_READ | PROT_WRITE);
  }
  ~Access() {
    const std::lock_guard lock(The().mutex);
    if (--The().accesses == 0) Protect(PROT_NONE);
  }
};

// Runs what lies before a place in the stream. What a lost device had to do is never done.
void RunUpTo(CUstream_st& stream, int64_t position) {
  const std::lock_guard lock(stream.mutex);
  if (stream.done >= position) return;
  const Access access;
  while (stream.done < position) {
    const std::function<void()> work = std::move(stream.work.front());
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
    if (!lost) work();
  }
}

cudaError_t Queue(cudaStream_t stream, std::function<void()> work) {
  if (stream == nullptr) Die("work on the default stream");
  if (stream->device != current_device) Die("work on a stream of another device");
  const std::lock_guard lock(stream->mutex);
  stream->work.push_back(std::move(work));
  ++stream->queued;
  return cudaSuccess;
}

}  // namespace

void FakeCuda::Reset(const FakeGpus& gpus) {
  Runtime& r = The();
  const std::lock_guard lock(r.mutex);
  if (r.held != FakeHeld()) Die("something is held");
  r.gpus = gpus;
  r.kernels.assign(static_cast<size_t>(gpus.count), 0);
  r.call_failure = r.launch_failure = r.allocation_failure = {};
  r.count_error = r.sticky = cudaSuccess;
  r.hook = nullptr;
  last_error = cudaSuccess;
}

FakeHeld FakeCuda::held() {
  const std::lock_guard lock(The().mutex);
  return The().held;
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
void FakeCuda::SetHook(std::function<void()> hook) {
  const std::lock_guard lock(The().mutex);
  The().hook = std::move(hook);
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
  return Queue(stream, std::move(work));
}

namespace {

cudaError_t Allocate(void** data, size_t size, bool on_device) {
  Runtime& r = The();
  const std::lock_guard lock(r.mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  if (const cudaError_t error = Failed(r.allocation_failure.Next()); error != cudaSuccess) {
    return error;
  }
  const auto bytes = static_cast<int64_t>(size);
  int64_t taken = 0;
  for (const auto& [begin, allocation] : r.device_memory) {
    if (allocation.device == current_device) taken += allocation.bytes;
  }
  if (on_device && bytes > r.gpus.memory_bytes - taken) return Failed(cudaErrorMemoryAllocation);
  void* const at = mmap(nullptr, size, on_device ? PROT_NONE : PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) Die("mmap");
  if (on_device) {
    if (r.accesses > 0) Die("an allocation while work runs");
    r.device_memory.emplace(static_cast<std::byte*>(at), Allocation{bytes, current_device});
    r.held.device_bytes += bytes;
  } else {
    r.pinned_memory.emplace(static_cast<std::byte*>(at), bytes);
    r.held.pinned_bytes += bytes;
  }
  *data = at;
  return cudaSuccess;
}

// Gives back what lies at `data` in either map.
template <class Map>
void Release(Map& map, void* data, int64_t* held, auto size_of) {
  const auto found = map.find(static_cast<std::byte*>(data));
  if (found == map.end()) Die("what is freed was not allocated");
  const int64_t bytes = size_of(found->second);
  munmap(data, static_cast<size_t>(bytes));
  *held -= bytes;
  map.erase(found);
}

}  // namespace
}  // namespace structkv::testing

// The runtime's functions. NOLINTBEGIN: their names are CUDA's.
using structkv::testing::Allocation;
using structkv::testing::Enter;
using structkv::testing::Failed;
using structkv::testing::The;

cudaError_t cudaGetDeviceCount(int* count) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  if (The().count_error != cudaSuccess) return Failed(The().count_error);
  *count = The().gpus.count;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  if (device < 0 || device >= The().gpus.count) return Failed(cudaErrorInvalidDevice);
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "Fake GPU");
  properties->major = The().gpus.major;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  structkv::testing::current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  switch (attribute) {
    case cudaDevAttrClusterLaunch:
      *value = The().gpus.major >= 9 ? 1 : 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 << 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    default:
      structkv::testing::Die("an attribute that is not known");
  }
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  int64_t taken = 0;
  for (const auto& [begin, allocation] : The().device_memory) {
    if (allocation.device == structkv::testing::current_device) taken += allocation.bytes;
  }
  *total = static_cast<size_t>(The().gpus.memory_bytes);
  *free = static_cast<size_t>(The().gpus.memory_bytes - taken);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t size) {
  return structkv::testing::Allocate(data, size, /*on_device=*/true);
}
cudaError_t cudaHostAlloc(void** data, size_t size, unsigned /*flags*/) {
  return structkv::testing::Allocate(data, size, /*on_device=*/false);
}
cudaError_t cudaFree(void* data) {
  const std::lock_guard lock(The().mutex);
  structkv::testing::Release(The().device_memory, data, &The().held.device_bytes,
                             [](const Allocation& a) { return a.bytes; });
  return The().sticky;
}
cudaError_t cudaFreeHost(void* data) {
  const std::lock_guard lock(The().mutex);
  structkv::testing::Release(The().pinned_memory, data, &The().held.pinned_bytes,
                             [](int64_t bytes) { return bytes; });
  return The().sticky;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned /*flags*/) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  *stream = new CUstream_st();
  (*stream)->device = structkv::testing::current_device;
  ++The().held.streams;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  structkv::testing::RunUpTo(*stream, stream->queued);
  delete stream;
  const std::lock_guard lock(The().mutex);
  --The().held.streams;
  return The().sticky;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  structkv::testing::RunUpTo(*stream, stream->queued);
  const std::lock_guard lock(The().mutex);
  return Enter();
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned /*flags*/) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  *event = new CUevent_st();
  ++The().held.events;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  const std::lock_guard lock(The().mutex);
  --The().held.events;
  return The().sticky;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  {
    const std::lock_guard lock(The().mutex);
    if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  }
  const std::lock_guard lock(stream->mutex);
  event->stream = stream;
  event->position = stream->queued;
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  {
    const std::lock_guard lock(The().mutex);
    if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  }
  if (event->stream != nullptr) structkv::testing::RunUpTo(*event->stream, event->position);
  const std::lock_guard lock(The().mutex);
  return Failed(The().sticky);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const auto bytes = static_cast<int64_t>(size);
  {
    const std::lock_guard lock(The().mutex);
    if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
    const bool up = kind == cudaMemcpyHostToDevice;
    if (!up && kind != cudaMemcpyDeviceToHost) structkv::testing::Die("a copy of another kind");
    if (!structkv::testing::IsDevice(up ? to : from, bytes)) {
      structkv::testing::Die("a copy's device side is not of one allocation");
    }
    if (!structkv::testing::IsPinned(up ? from : to, bytes)) {
      structkv::testing::Die("a copy's host side is not pinned");
    }
  }
  return structkv::testing::Queue(stream, [=] { std::memcpy(to, from, size); });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* data) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  *attributes = {};
  if (structkv::testing::IsDevice(data, 1)) {
    attributes->type = cudaMemoryTypeDevice;
  } else if (structkv::testing::IsPinned(data, 1)) {
    attributes->type = cudaMemoryTypeHost;
  }
  if (attributes->type != cudaMemoryTypeUnregistered) {
    attributes->devicePointer = const_cast<void*>(data);
  }
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const std::lock_guard lock(The().mutex);
  const cudaError_t error = structkv::testing::last_error;
  structkv::testing::last_error = The().sticky;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    default:
      return "cudaErrorOther";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    default:
      return "another error";
  }
}
// NOLINTEND
