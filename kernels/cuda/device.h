// A GPU as calls use it: each takes a lease of a stream, pinned staging memory and a block of the
// pool, all of which were made at the start.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/select_plan.h"
#include "kernels/cuda/staged.h"

namespace structkv::cuda {

// The first error after which a device can do nothing more in this process. Thread-safe.
class Loss {
 public:
  // `status` is not OK. Only the first call counts.
  void Lose(absl::Status status);
  // OK: none.
  absl::Status status() const;

 private:
  mutable std::mutex mutex_;
  absl::Status status_;
};

struct DeviceOptions {
  // Of the pool; 0: half of what is free.
  int64_t memory_bytes = 0;
  // The least of it beside what is set apart: what short prompts take.
  int64_t least_memory_bytes = int64_t{64} << 20;
  // Of the pool, set apart for Reserve; 0: half of it. None: there is nothing to reserve.
  std::optional<int64_t> reserve_bytes;
  // Of the rest, one part in so many is for resident vectors: 4.4 GiB of an H200's 70 GiB, which
  // are those of 340 prompts of 131,072 tokens. 0: none.
  int64_t resident_share = 16;
  // Calls at once. One copies while another computes, on a GPU that copies both ways at a time.
  // Twice as many layers are staged: of the prompts that compute, this one's and the next one's.
  int lanes = 4;
  // Of each of a lane's two pinned buffers: 80 microseconds of a bus of 50 GB/s, which hides what
  // it costs to queue a copy.
  int64_t slice_bytes = int64_t{4} << 20;
  // How long a call waits for its lease while none comes back. Leases are milliseconds long, so
  // that this means that the device is stuck; however many calls wait, each has its turn.
  std::chrono::milliseconds wait_limit = std::chrono::seconds(10);
};

// Each part of a lease's memory begins at a multiple of it.
inline constexpr int64_t kPartBytes = 256;

// Parts of one block of memory, one after the other.
class Parts {
 public:
  // The offset of `count` elements of type T.
  template <class T>
  int64_t Add(int64_t count) {
    const int64_t offset = bytes_;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    bytes_ += (bytes + kPartBytes - 1) / kPartBytes * kPartBytes;
    return offset;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// A pinned buffer that copies go through.
struct PinnedSlice {
  PinnedBytes bytes;
  Event copied;            // recorded after the last copy
  bool in_flight = false;  // that copy may not be done
};

struct Lane {
  Stream stream;
  std::array<PinnedSlice, 2> slices;
  int64_t slice_bytes = 0;
  size_t next = 0;  // the slice that is used next
};

class Device;

// For one thread at a time; the device outlives it. The destructor waits for what was queued on the
// stream.
class Lease {
 public:
  Lease(Lease&& other) noexcept
      : device_(other.device_),
        lane_(std::exchange(other.lane_, nullptr)),
        block_(std::move(other.block_)),
        memory_(other.memory_),
        staged_(other.staged_) {}
  ~Lease();

  Device& device() const { return *device_; }
  Lane& lane() const { return *lane_; }
  cudaStream_t stream() const { return lane_->stream.get(); }

  // The part of the lease's memory at an offset of Parts.
  template <class T>
  T* At(int64_t offset) const {
    return reinterpret_cast<T*>(memory_ + offset);
  }

 private:
  friend class Device;
  Lease(Device* device, Lane* lane, Arena::Block block, std::byte* memory, Staged* staged)
      : device_(device), lane_(lane), block_(std::move(block)), memory_(memory), staged_(staged) {}

  Device* device_;
  Lane* lane_;
  Arena::Block block_;
  std::byte* memory_;
  Staged* staged_;  // taken, until the lease ends; null: none
};

// Thread-safe.
class Device {
 public:
  // Takes the memory. `loss` outlives the device. RESOURCE_EXHAUSTED where there is less of it than
  // `options` want.
  static absl::StatusOr<std::unique_ptr<Device>> Open(int index, const DeviceOptions& options,
                                                      Loss* loss);

  // CUDA's.
  int index() const { return index_; }
  // "GPU 0"
  const std::string& name() const { return name_; }
  // "NVIDIA H200"
  const std::string& model() const { return model_; }
  // kDeviceUuidBytes.
  const std::string& uuid() const { return uuid_; }
  const SelectLimits& limits() const { return limits_; }
  // What calls have.
  int64_t pool_bytes() const { return pool_->calls().bytes(); }
  int64_t free_bytes() const { return pool_->calls().free_bytes(); }
  // What resident vectors have.
  int64_t resident_bytes() const { return pool_->resident().bytes(); }
  int64_t free_resident_bytes() const { return pool_->resident().free_bytes(); }
  // Memory of it, until the last share is gone. Null where not so much is free.
  std::shared_ptr<std::byte> TryResident(int64_t bytes) { return pool_->TakeResident(bytes); }
  // What is set apart.
  int64_t apart_bytes() const { return pool_->apart().bytes(); }
  int64_t free_apart_bytes() const { return pool_->apart().free_bytes(); }
  // Memory of what is set apart, until the last share is gone, which may outlive the device.
  // RESOURCE_EXHAUSTED, with the numbers, where not so much is free.
  absl::StatusOr<std::shared_ptr<std::byte>> Reserve(int64_t bytes);
  // The most that Reserve can give at once, when nobody else has any.
  int64_t reservable_bytes() const;
  // Whether the pool has room for so much when nobody else uses it.
  bool CanHold(int64_t bytes) const { return ArenaSize(bytes) <= pool_bytes(); }

  // Waits for its turn, for a lane and for `bytes` of the pool, in the order of the calls, and
  // makes this device the thread's current one. RESOURCE_EXHAUSTED where the pool can never hold
  // that much, or no lease came back within the limit; UNAVAILABLE where the backend is lost.
  //
  // With what is `staged` on this device: takes that too, so that it is there for what the lease's
  // stream does, and gives its block back with the lease. ABORTED, and nothing was acquired, where
  // its block is with somebody else, or is in the way of `bytes`.
  absl::StatusOr<Lease> Acquire(int64_t bytes, Staged* staged = nullptr);

  // Room for what is copied ahead of its call, where it is free and no call waits; makes this
  // device the thread's current one. Null where there is none: waits for nothing.
  std::unique_ptr<Staged> TryStage(int64_t bytes);

  // CudaStatus, with the device's name. A sticky error is the loss of the backend.
  absl::Status Check(cudaError_t error, std::string_view what);

 private:
  friend class Lease;
  friend class Staged;
  Device(int index, const DeviceOptions& options, Loss* loss)
      : index_(index), options_(options), loss_(loss) {}
  absl::Status Init();
  absl::Status MakeLanes();
  void GiveBack(Lane* lane, Arena::Block block, Staged* staged);

  // Of what is staged:
  cudaStream_t copies() const { return copies_.get(); }
  bool Finished(const Staged& staged);
  void Finish(Staged* staged);
  void GiveBack(Staged* staged);
  // Under the mutex: gives its block back, whether or not the copies to it are done.
  void TakeAway(Staged* staged);
  // Under the mutex: `bytes` of the pool, for which what is staged and not taken goes, the oldest
  // first, but for `own`.
  std::optional<Arena::Block> TakeBlock(int64_t bytes, const Staged* own);

  const int index_;
  DeviceOptions options_;
  Loss* const loss_;
  std::string name_;
  std::string model_;
  std::string uuid_;
  SelectLimits limits_;
  std::shared_ptr<DevicePool> pool_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  Stream copies_;  // of what is staged
  std::vector<std::shared_ptr<CUevent_st>>
      copied_;  // one for each; those that nobody shares are free

  std::mutex mutex_;
  std::condition_variable changed_;
  std::list<uint64_t> waiting_;  // the callers' tickets
  uint64_t next_ticket_ = 0;
  std::vector<Lane*> idle_;
  std::list<Staged*> staged_;  // that exist, oldest first
  // Of blocks that were taken away: copies to them may still be on their way, so that whatever a
  // call's stream does comes after these.
  std::vector<std::shared_ptr<CUevent_st>> taken_away_;
  std::chrono::steady_clock::time_point given_back_at_;  // the last lease
};

}  // namespace structkv::cuda
