// What a layer's input must be like before it is computed.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "service/engine/prompt.h"
#include "service/engine/prompt_spec.h"

namespace structkv::engine {

// INVALID_ARGUMENT for positions that are not the skeleton's, or not allowed for this layer.
// `skeleton`: null before the pivot is known.
absl::Status CheckPositions(const LayerInput& input, const Skeleton* skeleton);

// INVALID_ARGUMENT for a tensor of another size than `spec` says, and for scales that are no
// factors. `spec` has the heads that the input has; `first_head`: of the model's KV heads, the
// first of them.
absl::Status CheckTensors(const LayerInput& input, const PromptSpec& spec, int64_t first_head);

}  // namespace structkv::engine
