// Copies from the host, and other device memory, to a lease's memory; downloads.h has the way back.
// What is not pinned goes through the lane's two pinned slices in turns, so that the host fills one
// while the other is on the bus. Errors are those of Device::Check.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/device.h"
#include "kernels/tensor.h"

namespace structkv::cuda {

// Pinned memory is copied without staging in pieces of at least so much; what is smaller costs
// less to copy than to queue.
inline constexpr int64_t kDirectBytes = int64_t{64} << 10;

// To the device, in the order of the stream. After an error the other calls do nothing.
class Upload {
 public:
  explicit Upload(const Lease& lease) : lease_(lease) {}

  // Of `count` elements. Null stays null. Pinned ones stay as they are until the stream is done;
  // all others may change once this has returned.
  template <class T>
  void Write(T* to, const T* from, int64_t count) {
    if (from == nullptr) return;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    WriteBytes(to, from, bytes, bytes >= kDirectBytes && IsPinned(from, bytes));
  }
  // The vectors of a view, of the host's memory or a device's, dense in `layout`; likewise, and
  // what lies on a device stays as it is until the stream is done.
  void WriteTensor(void* to, const TensorView& from, Layout layout);
  // What follows on from the last one's end on the device shares its copies. `direct`: pinned or a
  // device's, and copied without staging.
  void WriteBytes(void* to, const void* from, int64_t bytes, bool direct);
  // What `fill` makes, staged, as WriteBytes.
  void Fill(void* to, int64_t bytes, FillRun fill);
  // Queues all that was written, before a launch that reads it. The first error of all.
  absl::Status Flush();

 private:
  PinnedSlice& slice() const { return lease_.lane().slices[lease_.lane().next]; }
  // Queues the copy of what the slice has for one place.
  void Send();
  // Goes on with the other slice.
  void Turn();

  const Lease& lease_;
  absl::Status status_;
  std::byte* to_ = nullptr;  // of what is not sent yet
  int64_t begin_ = 0;        // its first byte in the slice
  int64_t end_ = 0;          // of what is written in the slice
};

// Whether a view of the host's memory lies in pinned memory, where kernels read it at its address.
bool LiesInPinned(const TensorView& view);

// Waits for all that was queued on the stream.
absl::Status WaitFor(const Lease& lease);

// A copy on the lease's stream.
absl::Status Copy(const Lease& lease, void* to, const void* from, int64_t bytes,
                  cudaMemcpyKind kind);
// Of a slice: marks that what is queued so far is the last that uses it; and waits for that,
// asleep.
absl::Status Mark(const Lease& lease, PinnedSlice& slice);
absl::Status WaitFor(const Lease& lease, PinnedSlice& slice);

}  // namespace structkv::cuda
