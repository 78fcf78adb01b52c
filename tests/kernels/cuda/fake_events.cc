// Events of cuda_runtime_api.h, on the fake runtime.
#include <sys/mman.h>

#include "tests/kernels/cuda/fake_state.h"

using structkv::testing::FakeWork;
using namespace structkv::testing::fake;  // NOLINT: the functions are CUDA's, and global

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  *event = new CUevent_st();
  if ((flags & cudaEventInterprocess) != 0) {
    if ((flags & cudaEventDisableTiming) == 0) Die("an event between processes that takes times");
    (*event)->file = MakeShared(sizeof(SharedEvent), PROT_READ | PROT_WRITE);
    (*event)->shared = static_cast<SharedEvent*>((*event)->file.data);
  }
  ++The().held.events;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (event->shared != nullptr) Drop(event->file);
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
  if (event->shared != nullptr) {
    SharedEvent* const shared = event->shared;
    const int64_t record = ++shared->recorded;
    Queue(stream, FakeWork::Kind::kRecord, 0, [shared, record] { shared->reached = record; });
  }
  const std::lock_guard lock(stream->mutex);
  event->stream = stream;
  event->position = stream->queued;
  return cudaSuccess;
}

// Lets one more piece of the stream's work run where there is any left.
cudaError_t cudaEventQuery(cudaEvent_t event) {
  {
    const std::lock_guard lock(The().mutex);
    if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  }
  if (event->shared != nullptr && event->shared->reached >= event->shared->recorded) {
    return cudaSuccess;
  }
  if (event->stream == nullptr) {
    return event->shared == nullptr ? cudaSuccess : cudaErrorNotReady;
  }
  int64_t done = 0;
  {
    const std::lock_guard lock(event->stream->mutex);
    done = event->stream->done;
  }
  if (done >= event->position) return cudaSuccess;
  RunUpTo(*event->stream, done + 1);
  return cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  {
    const std::lock_guard lock(The().mutex);
    if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  }
  if (event->stream != nullptr) RunUpTo(*event->stream, event->position);
  const std::lock_guard lock(The().mutex);
  return Failed(The().sticky);
}
