// What follows the saliency, on the GPU, of and to vectors in the host's memory; as the operations
// of these names in kernels/backend.h. Errors are those of Device::Acquire and Device::Check.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cuda/devices.h"
#include "kernels/cuda/statistics_kernel.h"

namespace structkv::cuda {

// As the kernels have it.
Smoothing SmoothingOf(Pooling pooling);

absl::Status SumHeads(Devices& devices, const float* per_head, int64_t heads, int64_t tokens,
                      float* out);
absl::StatusOr<std::optional<BadStatistic>> FindBad(Devices& devices, const float* values,
                                                    int64_t heads, int64_t tokens);
absl::Status Pool(Devices& devices, const float* in, int64_t tokens, Pooling pooling,
                  int64_t kernel, float* out);
absl::StatusOr<SaliencySums> Sums(Devices& devices, const float* scores, int64_t tokens,
                                  int64_t top_count);
// On an error `centrality` is as it was.
absl::Status Accumulate(Devices& devices, float decay, const float* saliency, float* centrality,
                        int64_t tokens);
absl::Status Select(Devices& devices, const structkv::SelectParams& params, int32_t* positions);

}  // namespace structkv::cuda
