// Moving keys that rotary position embedding has rotated to other positions.
#pragma once

#include <cstdint>

namespace structkv {

// Which elements of the rotated part, 2 * pairs long, are one pair.
enum class RotaryPairing : uint8_t {
  kHalfSplit,    // j and j + pairs (Llama, GPT-NeoX)
  kInterleaved,  // 2 j and 2 j + 1 (GPT-J)
};

// How kept keys are rotated. Pair (x, y) number j of the key that stood at position p and is to
// stand at position i becomes (x cos a - y sin a, y cos a + x sin a), a = to[j] i - from[j] p.
//
// Both products are rounded to float32, because the models' own rotation is: at a million tokens
// that is worth 0.03 radians, which must be undone as well. Their difference, its sine and its
// cosine are taken in double precision; the rotation itself is done in float32 at least and rounded
// to the keys' type once. A key whose position and frequencies stay is copied to the byte.
struct RotationParams {
  RotaryPairing pairing = RotaryPairing::kHalfSplit;
  // The rotated part of each key: 2 * pairs elements from `offset` on. The others are copied.
  int64_t offset = 0;
  int64_t pairs = 0;
  // [pairs] radians per token, not null: what the keys were rotated with, and are to be.
  const float* from = nullptr;
  const float* to = nullptr;
  // The positions that the kept keys were rotated for, shaped as the rows that are gathered, not
  // null.
  const int32_t* positions = nullptr;
  // Where the first kept key of each head is to stand; each further one stands one later.
  int64_t first_position = 0;
};

}  // namespace structkv
