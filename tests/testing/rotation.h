// What a kept key must have been turned to, in double precision, straight from the formulas and
// with none of the project's code.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "structkv/v1/compression.pb.h"

namespace structkv::testkit {

// One key's way: element `from` of `source` is its first before, element `to` of `got` after.
struct TurnedKey {
  const std::string& source;
  size_t from;
  const std::string& got;
  size_t to;
  uint32_t position;      // where it stood in a prompt of open.prompt_tokens()
  uint32_t new_position;  // where it must stand
  uint32_t kv_length;     // in a prompt of so many
};

// Whether `got` is `source`, turned as `open.rotary()` says, to the rounding of the element type.
// Knows ROPE_TYPE_DEFAULT, _LINEAR and _DYNAMIC; prompts of some thousand tokens.
bool IsTurned(const v1::Open& open, const TurnedKey& key);

}  // namespace structkv::testkit
