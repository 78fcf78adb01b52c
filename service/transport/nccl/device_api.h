// What NCCL's callers need of CUDA: a thread's device, streams and events. A table of functions, so
// that all of it builds and is tested without CUDA. cuda_device_api.h has the real one.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "service/transport/nccl/nccl_abi.h"

namespace structkv::nccl {

// None is null. Errors are UNAVAILABLE where the device is lost, else INTERNAL.
struct DeviceApi {
  // Makes it the calling thread's device, which the other functions are of.
  absl::Status (*set_device)(int device);
  // Ordered after no other stream.
  absl::StatusOr<Stream*> (*create_stream)();
  void (*destroy_stream)(Stream* stream);
  // What is queued from now on waits for `event` (a cudaEvent_t that was recorded).
  absl::Status (*wait_event)(Stream* stream, void* event);
  // Whether all that was queued has run. Never waits.
  absl::StatusOr<bool> (*stream_done)(Stream* stream);
  // Names the device on its host: its PCI bus id.
  absl::StatusOr<std::string> (*bus_id)(int device);
};

}  // namespace structkv::nccl
