// What `structkv bench` is asked for.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "client/cli/compressor.h"
#include "client/cli/method_flags.h"
#include "client/cli/rotary_flags.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::cli {

struct BenchFlags {
  std::string geometry = "llama-3.1-8b";
  std::optional<uint32_t> layers, query_heads, kv_heads, dim, value_dim;
  uint32_t tokens = 8192;
  bool values_in_keys = false;
  uint32_t paged = 0;
  std::optional<double> attention_scale;
  std::string dtype = "bf16";
  std::string kv_scales = "none";
  std::string layout = "head-token-dim";
  std::optional<std::string> statistic;  // unset: the method's own
  MethodFlags method;
  RotaryFlags rotary;
  ConnectionFlags connection;
  uint32_t prompts = 4;
  uint32_t concurrency = 1;
  uint32_t batch = 1;
  uint32_t shards = 1;
  uint32_t layers_in_flight = 0;
  uint32_t chunk_kib = 2048;
  uint64_t seed = 1;
  bool plan = false;
  bool pull = false;
  bool hold = false;
  bool bytes = false;
  bool checksums = false;
  bool json = false;
};

void AddBenchFlags(CLI::App* app, BenchFlags* flags);

// INVALID_ARGUMENT for flags that do not go together.
absl::Status CheckBenchFlags(const BenchFlags& flags);

// Lengths of the prompts of one stream: the first has `flags.tokens`, the others, by `flags.seed`,
// from a quarter of that up to all of it.
std::vector<uint32_t> BatchTokens(const BenchFlags& flags);

// The prompt that the flags describe, with `tokens` tokens.
absl::StatusOr<v1::Open> MakeBenchOpen(const BenchFlags& flags, uint32_t tokens);

}  // namespace structkv::cli
