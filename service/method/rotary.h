// Rotary position embedding as models are configured with it, and its frequencies.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/rotation.h"

namespace structkv::method {

// How a model stretches its context; `rope_type` of a Hugging Face config.json.
enum class RopeType : uint8_t { kDefault, kLinear, kDynamic, kYarn, kLlama3 };

// Names as in config.json. A parameter that the type does not have is not looked at.
struct RotarySpec {
  RopeType type = RopeType::kDefault;
  double theta = 0;                              // base of the frequencies
  double factor = 1;                             // all but kDefault
  int64_t original_max_position_embeddings = 0;  // kYarn, kLlama3
  int64_t max_position_embeddings = 0;           // kDynamic
  double beta_fast = 32;                         // kYarn
  double beta_slow = 1;                          // kYarn
  bool truncate = true;                          // kYarn
  double low_freq_factor = 0;                    // kLlama3
  double high_freq_factor = 0;                   // kLlama3
  RotaryPairing pairing = RotaryPairing::kHalfSplit;
  int64_t dim = 0;     // elements of a key that rotate, even
  int64_t offset = 0;  // the first of them

  int64_t pairs() const { return dim / 2; }
};

// Radians per token of each pair, [pairs]. kDynamic's depend on how many tokens the sequence has
// for which keys are rotated; the others' do not.
//
// Computed step by step in float32, as Hugging Face's modeling_rope_utils.py does: what the keys
// were rotated by holds these roundings, and far into a prompt they count. The spec is valid.
std::vector<float> InverseFrequencies(const RotarySpec& spec, int64_t sequence_tokens);

}  // namespace structkv::method
