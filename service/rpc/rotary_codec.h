// The public API's `RotaryParameters` and the engine's, each from the other.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "service/method/rotary.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::rpc {

// Defaults are those of the proto's comments. INVALID_ARGUMENT, naming the field of `open.rotary`,
// for an unknown enum value, a missing parameter that the type needs, and one that it does not
// have. Ranges are for engine::ValidateSpec.
absl::StatusOr<method::RotarySpec> DecodeRotary(const v1::RotaryParameters& rotary,
                                                int64_t key_dim);

// With every parameter in force.
v1::RotaryParameters EncodeRotary(const method::RotarySpec& spec);

}  // namespace structkv::rpc
