// Keys that go to a device ahead of the call that uses them, so that they are on the bus while
// another layer is computed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/arena.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/staged_layer.h"

namespace structkv::cuda {

class Device;
class Devices;

// A block of a device's pool, and what is copied to it on the device's stream for that. Until a
// call has taken it, any call that waits for memory may have the block instead: nothing ever waits
// for what is staged, and it takes no room from what runs. The device outlives it.
class Staged final : public StagedLayer {
 public:
  ~Staged() override;

  Device& device() const { return *device_; }
  std::byte* data() const { return data_; }
  // Of the stream that the copies are queued on; copies from pinned memory.
  absl::Status Copy(int64_t offset, const void* from, int64_t bytes);
  // After the last copy. Before it nobody takes the block away.
  absl::Status Finish();

 private:
  friend class Device;
  Staged(Device* device, Arena::Block block, std::byte* data, std::shared_ptr<CUevent_st> copied)
      : device_(device), data_(data), copied_(std::move(copied)), block_(std::move(block)) {}

  Device* const device_;
  std::byte* const data_;
  // Recorded after the copies. Shared with whoever must not touch the block before.
  const std::shared_ptr<CUevent_st> copied_;

  // Under the device's mutex:
  std::optional<Arena::Block> block_;  // none: it was given back
  bool finished_ = false;
  bool taken_ = false;  // by a call that has its lease
};

// As Backend::Stage: of keys in the host's pinned memory that lie in long runs.
std::unique_ptr<StagedLayer> StageKeys(Devices& devices, const SaliencyParams& params, int gpu);

}  // namespace structkv::cuda
