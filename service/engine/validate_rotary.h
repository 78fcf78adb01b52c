// What rotary parameters must be.
#pragma once

#include "absl/status/status.h"
#include "service/engine/prompt_spec.h"

namespace structkv::engine {

// INVALID_ARGUMENT, naming the field of `open.rotary`, the value and the limit. The rest of the
// spec is valid. OK where the spec has none.
absl::Status ValidateRotary(const PromptSpec& spec);

}  // namespace structkv::engine
