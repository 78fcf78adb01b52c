// A GPU of this process that transfers by NCCL with the GPU of a server, on another host.
//
//   auto gpu = structkv::client::NcclGpu::Open({.gpu = 0});
//   options.nccl = *gpu;                  // SessionOptions
//   options.results = arena;              // of a region of that GPU, which kept rows are received
//   in
//
// docs/transports.md says what that needs.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace structkv::client {

namespace internal {
class NcclDevice;
}  // namespace internal

struct NcclOptions {
  // Its number, as CUDA counts them in this process.
  int gpu = 0;
  // Names or paths of NCCL and of CUDA's driver.
  std::string nccl_library = "libnccl.so.2";
  std::string cuda_library = "libcuda.so.1";
  // How long a server may take to answer when the GPU is attached to it.
  absl::Duration attach_limit = absl::Seconds(10);
};

// Thread-safe. One thread of its own alone calls NCCL. It is attached to a server with the first
// prompt or fetch that may use it, and anew once that has ended; make one for each GPU, and use it
// for all servers. Sessions hold it.
class NcclGpu {
 public:
  // FAILED_PRECONDITION, or NOT_FOUND for NCCL, with the reason: a library is missing or too old,
  // or there is no such GPU.
  static absl::StatusOr<std::shared_ptr<NcclGpu>> Open(const NcclOptions& options);
  explicit NcclGpu(std::unique_ptr<internal::NcclDevice> device);
  ~NcclGpu();
  NcclGpu(const NcclGpu&) = delete;
  NcclGpu& operator=(const NcclGpu&) = delete;

  // For Client.
  internal::NcclDevice& device() const { return *device_; }

 private:
  const std::unique_ptr<internal::NcclDevice> device_;
};

}  // namespace structkv::client
