// Streams a synthetic prompt that is larger than the memory of the machine: its tensors exist only
// while they are sent.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::bench {

// Llama-3.1-8B's attention: 32 query heads, 8 KV heads of 128, bf16; StructKV at 10 %.
v1::Open LlamaOpen(uint32_t layers, uint32_t tokens);

struct StreamedPrompt {
  v1::Opened opened;
  v1::Summary summary;
  double seconds = 0;
  uint64_t layer_bytes = 0;    // keys, values and window queries of one layer
  uint64_t results_bytes = 0;  // compacted keys and values, and positions, of all layers
};

// Sends every layer of `open` in pieces cut at random from a table, and drops the results as they
// arrive: the caller's memory stays below 100 MB at any prompt length up to 131,072. Fails with the
// stream's status.
absl::StatusOr<StreamedPrompt> StreamPrompt(const std::string& address, const v1::Open& open);

}  // namespace structkv::bench
