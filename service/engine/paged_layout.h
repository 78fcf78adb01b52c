// Where a prompt's keys and values lie in a pool of blocks, as engines with paged attention keep
// them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"

namespace structkv::engine {

// Tokens of a block: multiples of kBlockTokensStep up to kMaxBlockTokens, which is what vLLM,
// SGLang and TensorRT-LLM use and more.
inline constexpr int64_t kBlockTokensStep = 16;
inline constexpr int64_t kMaxBlockTokens = 4096;

struct PagedLayout {
  int64_t block_tokens = 0;
  // Blocks that a layer's keys, and likewise its values, come in: at least those of the prompt.
  int64_t block_count = 0;
  // [Blocks(N)], shared by all layers: entry i is the block of the tokens from i * block_tokens on.
  // Not null.
  std::shared_ptr<const std::vector<int32_t>> block_table;

  // Blocks that `tokens` fill.
  int64_t Blocks(int64_t tokens) const { return (tokens + block_tokens - 1) / block_tokens; }
  // Tokens that these have room for.
  int64_t Slots(int64_t tokens) const { return Blocks(tokens) * block_tokens; }
};

// INVALID_ARGUMENT, naming the field as the proto does, the entry, the value and the limit, where
// sizes are out of range or the table is not one of a prompt of `tokens`: of another length, with a
// block outside the pool, or with one block twice.
absl::Status CheckPagedLayout(const PagedLayout& paged, int64_t tokens);

}  // namespace structkv::engine
