// What the layers of a prompt keep, where they may differ.
#pragma once

#include <cstdint>
#include <string>

#include "structkv/v1/compression.pb.h"

namespace structkv::cli {

struct Kept {
  uint32_t least = 0;  // tokens in a layer
  uint32_t most = 0;
  uint64_t total = 0;  // tokens of all layers together
};

// Of the cache that a decoder works with: after GemFilter's second prefill every layer holds the
// tokens that the filter layer chose.
Kept KeptOf(const v1::Opened& opened);

// "100", or "35 to 165" where the layers differ.
std::string KeptText(uint32_t least, uint32_t most);

}  // namespace structkv::cli
