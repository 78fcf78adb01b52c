// Memory of a GPU that servers of this host open by CUDA IPC.
#pragma once

#include <cstddef>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "client/cpp/cuda_driver.h"
#include "client/cpp/region_memory.h"
#include "structkv/region.h"
#include "structkv/v1/region.pb.h"

namespace structkv::client::internal {

// An allocation, whole, and the event that says when it is written. Freed, or its owner released,
// with the object, which its registrations hold until the server has closed the memory.
// Thread-safe.
class GpuMemory final : public RegionMemory, public std::enable_shared_from_this<GpuMemory> {
 public:
  // See MakeGpuMemory and AdoptGpuMemory.
  static absl::StatusOr<std::shared_ptr<GpuMemory>> Make(const GpuAllocation& adopted,
                                                         RegionOptions* options);
  ~GpuMemory() override;

  std::byte* data() const override { return data_; }
  const GpuMemory* gpu() const override { return this; }
  absl::StatusOr<std::unique_ptr<Registration>> Register(const RegionServer& server,
                                                         const RegionOptions& options,
                                                         absl::Time deadline) override;

  const CudaDevice& device() const { return *device_; }
  // A cudaEvent_t, which is recorded or not.
  cuda::Event* event() const { return event_; }
  // Of `stream`, a cudaStream_t, and of what was recorded before.
  absl::Status Record(void* stream) const;
  // Of what was recorded of `other`.
  absl::Status RecordAlso(const GpuMemory& other) const;
  // Between any two kinds of memory, behind the last record; waits.
  absl::Status Copy(std::byte* to, const std::byte* from, size_t bytes) const {
    return device_->Copy(to, from, bytes, event_);
  }
  // As a server is told of it.
  absl::StatusOr<v1::CudaIpcMemory> Export(bool own_process) const;

 private:
  explicit GpuMemory(std::shared_ptr<CudaDevice> device) : device_(std::move(device)) {}
  absl::Status Allocate(size_t bytes);
  absl::Status Adopt(const GpuAllocation& adopted, RegionOptions* options);
  // Of what was recorded before, and of what lies before the last record of `event`.
  absl::Status RecordBehind(cuda::Event* event) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(record_mutex_);

  const std::shared_ptr<CudaDevice> device_;
  std::byte* data_ = nullptr;
  bool allocated_ = false;
  std::shared_ptr<const void> owner_;
  cuda::Event* event_ = nullptr;
  mutable absl::Mutex record_mutex_;
  cuda::Event* mark_ = nullptr;  // in a caller's stream; recorded and waited for under the mutex
};

// Of `options.gpu`; `options` get the size that it has.
absl::StatusOr<std::shared_ptr<RegionMemory>> MakeGpuMemory(RegionOptions* options);
absl::StatusOr<std::shared_ptr<RegionMemory>> AdoptGpuMemory(const GpuAllocation& allocation,
                                                             RegionOptions* options);

}  // namespace structkv::client::internal
