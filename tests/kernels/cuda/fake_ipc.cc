// CUDA IPC on the fake runtime: memory and events are files, which another process opens by way of
// /proc as long as the exporting one lives.
#include <cuda.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "tests/kernels/cuda/fake_state.h"

namespace structkv::testing::fake {
namespace {

constexpr int64_t kPage = 4096;

int64_t WholePages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// What a handle of CUDA's 64 bytes holds here.
struct Handle {
  int32_t process = 0;
  int32_t fd = -1;
  int64_t bytes = 0;
  uint64_t number = 0;
};

void* Map(int fd, int64_t offset, int64_t bytes, int protection) {
  return mmap(nullptr, static_cast<size_t>(bytes), protection, MAP_SHARED | MAP_NORESERVE, fd,
              offset);
}

template <class Bytes>
void Write(const SharedFile& file, Bytes* to) {
  static_assert(sizeof(Handle) <= sizeof(Bytes));
  const Handle handle = {getpid(), file.fd, file.bytes, file.owner->number};
  *to = {};
  std::memcpy(to, &handle, sizeof(handle));
}

// The file of another process. cudaErrorDeviceUninitialized where it is of this one, as CUDA has
// it.
template <class Bytes>
cudaError_t Import(const Bytes& bytes, int protection, SharedFile* file) {
  Handle handle;
  std::memcpy(static_cast<void*>(&handle), &bytes, sizeof(handle));
  if (handle.process == getpid()) return cudaErrorDeviceUninitialized;
  const std::string path =
      "/proc/" + std::to_string(handle.process) + "/fd/" + std::to_string(handle.fd);
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return cudaErrorInvalidResourceHandle;
  const int64_t pages = WholePages(handle.bytes);
  // What now has that number may be another file, and shorter.
  void* owner = lseek(fd, 0, SEEK_END) == pages + kPage
                    ? Map(fd, pages, kPage, PROT_READ | PROT_WRITE)
                    : MAP_FAILED;
  *file = {.bytes = handle.bytes, .owner = static_cast<SharedFile::Owner*>(owner)};
  if (owner == MAP_FAILED || file->owner->number != handle.number) {
    if (owner != MAP_FAILED) munmap(owner, kPage);
    close(fd);
    return cudaErrorInvalidResourceHandle;
  }
  file->data = Map(fd, 0, pages, protection);
  close(fd);
  if (file->data == MAP_FAILED) Die("mmap of another process's memory");
  ++file->owner->importers;
  return cudaSuccess;
}

}  // namespace

CUresult AddressRange(CUdeviceptr* base, size_t* size, CUdeviceptr address) {
  const std::lock_guard lock(The().mutex);
  auto* const at = reinterpret_cast<std::byte*>(address);
  if (!IsDevice(at, 1)) return CUDA_ERROR_NOT_FOUND;
  const auto found = std::prev(The().device_memory.upper_bound(at));
  *base = reinterpret_cast<CUdeviceptr>(found->first);
  *size = static_cast<size_t>(found->second.bytes);
  return CUDA_SUCCESS;
}

SharedFile MakeShared(int64_t bytes, int protection) {
  SharedFile file = {.fd = memfd_create("fake-cuda", MFD_CLOEXEC), .bytes = bytes};
  const int64_t pages = WholePages(bytes);
  if (file.fd < 0 || ftruncate(file.fd, pages + kPage) != 0) Die("memfd");
  file.data = Map(file.fd, 0, pages, protection);
  void* const owner = Map(file.fd, pages, kPage, PROT_READ | PROT_WRITE);
  if (file.data == MAP_FAILED || owner == MAP_FAILED) Die("mmap");
  file.owner = static_cast<SharedFile::Owner*>(owner);
  if (getrandom(&file.owner->number, sizeof(file.owner->number), 0) < 0) Die("getrandom");
  return file;
}

bool Drop(const SharedFile& file) {
  if (file.imported()) --file.owner->importers;
  const bool open = file.owner->importers > 0;
  munmap(file.data, static_cast<size_t>(WholePages(file.bytes)));
  munmap(file.owner, kPage);
  if (!file.imported()) close(file.fd);
  return open;
}

}  // namespace structkv::testing::fake

using namespace structkv::testing::fake;  // NOLINT: the functions are CUDA's, and global

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* data) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  const auto found = The().device_memory.find(static_cast<std::byte*>(data));
  if (found == The().device_memory.end() || found->second.file.imported()) {
    return Failed(cudaErrorInvalidValue);
  }
  Write(found->second.file, handle);
  return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void** data, cudaIpcMemHandle_t handle, unsigned flags) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  if (flags != cudaIpcMemLazyEnablePeerAccess) Die("a handle is opened without its flag");
  Allocation opened = {.device = current_device};
  const cudaError_t error = Import(handle, Protection(), &opened.file);
  if (error != cudaSuccess) return Failed(error);
  for (const auto& [begin, allocation] : The().device_memory) {
    if (allocation.file.owner->number == opened.file.owner->number) Die("a handle is opened twice");
  }
  opened.bytes = opened.file.bytes;
  The().device_memory.emplace(static_cast<std::byte*>(opened.file.data), opened);
  ++The().held.imports;
  *data = opened.file.data;
  return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void* data) {
  const std::lock_guard lock(The().mutex);
  const auto found = The().device_memory.find(static_cast<std::byte*>(data));
  if (found == The().device_memory.end() || !found->second.file.imported()) {
    Die("what is closed was not opened");
  }
  Drop(found->second.file);
  The().device_memory.erase(found);
  --The().held.imports;
  return The().sticky;
}

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t event) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  if (event->shared == nullptr) return Failed(cudaErrorInvalidResourceHandle);
  Write(event->file, handle);
  return cudaSuccess;
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t handle) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  SharedFile file;
  const cudaError_t error = Import(handle, PROT_READ | PROT_WRITE, &file);
  if (error != cudaSuccess) return Failed(error);
  *event = new CUevent_st();
  (*event)->file = file;
  (*event)->shared = static_cast<SharedEvent*>(file.data);
  ++The().held.events;
  return cudaSuccess;
}

// Of the driver's calls there is one.
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function,
                                             unsigned /*version*/, unsigned long long /*flags*/,
                                             cudaDriverEntryPointQueryResult* found) {
  const std::lock_guard lock(The().mutex);
  if (const cudaError_t error = Enter(); error != cudaSuccess) return error;
  if (std::string(symbol) != "cuMemGetAddressRange") Die("a call of the driver's is not known");
  *function = reinterpret_cast<void*>(&AddressRange);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
