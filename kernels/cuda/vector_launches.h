// Launches on vectors that lie on a lease's device, ordered on its stream.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/devices.h"
#include "kernels/cuda/downloads.h"
#include "kernels/cuda/select.h"
#include "kernels/cuda/statistics.h"

namespace structkv::cuda {

inline absl::Status RunStatistics(const Lease& lease, const StatisticsParams& params) {
  return lease.device().Check(LaunchStatistics(params, lease.stream()), "LaunchStatistics");
}

// `centrality` becomes decay * it + `saliency`, both [tokens].
inline absl::Status RunAccumulate(const Lease& lease, float decay, const float* saliency,
                                  float* centrality, int64_t tokens) {
  return RunStatistics(
      lease,
      {.values = saliency, .heads = 1, .tokens = tokens, .centrality = centrality, .decay = decay});
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
// Of one row, and brings its positions to the host's `positions`.
inline absl::Status SelectToHost(const Lease& lease, const SelectRow& row, void* scratch,
                                 int32_t* positions) {
  absl::Status status = RunSelect(lease, &row, 1, scratch);
  if (!status.ok()) return status;
  return Download(lease, row.positions, row.keep * static_cast<int64_t>(sizeof(int32_t)),
                  positions);
}

}  // namespace structkv::cuda
