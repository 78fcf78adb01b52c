// Local saliency, docs/method.md section 1, in double precision.
#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"

namespace structkv::reference {

// As Backend::Saliency; the shapes were checked. `out` is [kv_heads, tokens], not null.
absl::Status Saliency(const SaliencyParams& params, float* out, BadStatistic* bad);

// Bytes that a call allocates.
int64_t SaliencyScratchBytes(const SaliencyParams& params);

}  // namespace structkv::reference
