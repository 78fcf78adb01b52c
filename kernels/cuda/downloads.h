// Copies from a lease's device to the host.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/staging.h"
#include "kernels/tensor.h"

namespace structkv::cuda {

// Queues copies after what is on the lease's stream, so that all of them are on the bus behind one
// another, and waits once. What goes to pinned memory in runs of kDirectBytes does so by itself;
// the rest comes by way of the lane's pinned slices, as many of them at a time as there are.
// Everything is there once Finish() returns. Errors are those of Device::Check; after one the rest
// is not copied.
class Downloads {
 public:
  explicit Downloads(const Lease& lease) : lease_(lease) {}

  void Read(const void* from, int64_t bytes, void* to);
  // Vectors that lie dense in `layout` on the device.
  void ReadTensor(const void* from, const MutableTensorView& to, Layout layout);
  absl::Status Finish();

 private:
  // Bytes of a slice and where they are to go.
  struct Part {
    const std::byte* from;
    std::byte* to;
    int64_t bytes;
  };
  // Where the next `most` bytes go, or the first of them.
  struct Run {
    std::byte* to = nullptr;
    int64_t bytes = 0;
  };
  using NextRun = absl::FunctionRef<Run(int64_t most)>;

  void Direct(const std::byte* from, int64_t bytes, std::byte* to);
  void BySlices(const std::byte* from, int64_t bytes, NextRun next);
  // Marks the copies to the slice, and goes on with the other one.
  void Turn();
  // Waits for the copies to a slice, and hands out what came.
  void Deliver(size_t slice);

  const Lease& lease_;
  absl::Status status_;
  int64_t used_ = 0;  // of the slice that is filled
  std::array<std::vector<Part>, 2> parts_;
};

// One of them.
absl::Status Download(const Lease& lease, const void* from, int64_t bytes, void* to);

}  // namespace structkv::cuda
