#include "tests/kernels/cuda/ipc_exporter.h"

#include <cuda_runtime_api.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels/cuda/device_memory.h"

namespace structkv::testing {
namespace {

// What the child says of its memory; no event: it has none, for lack of a GPU.
struct Parts {
  cudaIpcMemHandle_t memory;
  cudaIpcEventHandle_t event;
  char uuid[kDeviceUuidBytes];
  char exporter[kProcessIdBytes];
  uint64_t base;
};

template <class T>
void Put(int fd, const T& value) {
  if (write(fd, &value, sizeof(value)) != static_cast<ssize_t>(sizeof(value))) _exit(9);
}
template <class T>
T Take(int fd) {
  T value;
  if (read(fd, &value, sizeof(value)) != static_cast<ssize_t>(sizeof(value))) _exit(9);
  return value;
}

template <class T>
std::string AsString(const T& bytes) {
  return std::string(reinterpret_cast<const char*>(&bytes), sizeof(bytes));
}

}  // namespace

IpcExporter::IpcExporter(int gpu, int64_t bytes, std::function<int64_t()> says) {
  if (pipe(to_child_) != 0 || pipe(from_child_) != 0) std::abort();
  child_ = fork();
  if (child_ == 0) Serve(gpu, bytes, says);
  const Parts parts = Take<Parts>(from_child_[0]);
  if (parts.base == 0) return;
  memory_ = {.memory_handle = AsString(parts.memory),
             .bytes = bytes,
             .device_uuid = AsString(parts.uuid),
             .exporter = AsString(parts.exporter),
             .base_address = parts.base,
             .event_handle = AsString(parts.event)};
}

IpcExporter::~IpcExporter() {
  Kill();
  for (const int fd : {to_child_[0], to_child_[1], from_child_[0], from_child_[1]}) close(fd);
}

void IpcExporter::Kill() {
  if (child_ <= 0) return;
  kill(child_, SIGKILL);
  waitpid(child_, nullptr, 0);
  child_ = -1;
}

int64_t IpcExporter::Ask(char what) {
  Put(to_child_[1], what);
  return Take<int64_t>(from_child_[0]);
}

void IpcExporter::Serve(int gpu, int64_t bytes, const std::function<int64_t()>& says) const {
  Parts parts = {};
  cudaDeviceProp properties;
  if (cudaSetDevice(gpu) != cudaSuccess ||
      cudaGetDeviceProperties(&properties, gpu) != cudaSuccess) {
    Put(from_child_[1], parts);
    _exit(0);
  }
  cuda::DeviceBytes memory = *cuda::MakeDeviceBytes(bytes);
  const cuda::Stream stream = *cuda::MakeStream();
  cudaEvent_t event = nullptr;
  if (cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventInterprocess) !=
          cudaSuccess ||
      cudaMemsetAsync(memory.get(), 7, 1, stream.get()) != cudaSuccess ||
      cudaEventRecord(event, stream.get()) != cudaSuccess ||
      cudaIpcGetMemHandle(&parts.memory, memory.get()) != cudaSuccess ||
      cudaIpcGetEventHandle(&parts.event, event) != cudaSuccess) {
    _exit(8);
  }
  std::memcpy(parts.uuid, properties.uuid.bytes, sizeof(parts.uuid));
  std::memcpy(parts.exporter, ProcessId().data(), sizeof(parts.exporter));
  parts.base = reinterpret_cast<uint64_t>(memory.get());
  Put(from_child_[1], parts);
  for (;;) {
    const char what = Take<char>(to_child_[0]);
    if (what == 'r') (void)cudaStreamSynchronize(stream.get());
    if (what == 'f') memory.reset();
    Put(from_child_[1], says());
  }
}

}  // namespace structkv::testing
