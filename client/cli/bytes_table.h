// What each mode of Compress moves, from the sizes that follow from its `Open`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::cli {

// One way to have a prompt compressed.
struct Mode {
  std::string name;
  v1::Open open;               // without prompt_tokens
  bool skeleton_rows = false;  // layers that may come as skeleton rows do
};

// The modes of StructKV with its defaults, for 2-byte elements of a known geometry.
absl::StatusOr<std::vector<Mode>> ModesOf(const std::string& geometry);

// Tensor bytes to the server and back, of the pivot and of pulls too.
struct MovedBytes {
  uint64_t in = 0;
  uint64_t out = 0;
};
absl::StatusOr<MovedBytes> MovedBytesOf(const Mode& mode, uint32_t tokens);

// The modes of a geometry at 8K, 32K, 128K and 1M tokens, as a table in Markdown.
absl::StatusOr<std::string> BytesTable(const std::string& geometry);

}  // namespace structkv::cli
