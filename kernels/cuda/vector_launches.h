// Launches on vectors that lie on a lease's device, ordered on its stream.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/devices.h"
#include "kernels/cuda/select.h"
#include "kernels/cuda/statistics.h"

namespace structkv::cuda {

inline absl::Status RunStatistics(const Lease& lease, const StatisticsParams& params) {
  return lease.device().Check(LaunchStatistics(params, lease.stream()), "LaunchStatistics");
}

// Scratch memory that the selection of some rows needs on a device.
inline int64_t SelectScratch(const Device& device, const SelectRow* rows, int64_t count) {
  return SelectScratchBytes(rows, count, device.limits());
}
// `scratch`: of SelectScratch bytes.
inline absl::Status RunSelect(const Lease& lease, const SelectRow* rows, int64_t count,
                              void* scratch) {
  const Device& device = lease.device();
  return lease.device().Check(LaunchSelect({.rows = rows,
                                            .row_count = count,
                                            .scratch = scratch,
                                            .scratch_bytes = SelectScratch(device, rows, count),
                                            .limits = device.limits()},
                                           lease.stream()),
                              "LaunchSelect");
}

}  // namespace structkv::cuda
