// Turning kept keys to consecutive positions: what a layer's gather is told.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/rotation.h"
#include "service/engine/prompt_spec.h"

namespace structkv::engine {

// How the kept keys of one layer are turned. `params` points into it, into the Rerotation and into
// the rows that it was made for.
struct LayerRotation {
  RotationParams params;
  std::vector<int32_t> originals;  // of a layer of skeleton rows, else empty
  bool moves = false;              // false: every key stays what it is
};

// Of one prompt; its spec has rotary parameters. Thread-safe.
class Rerotation {
 public:
  explicit Rerotation(const PromptSpec& spec);

  // Bytes that one holds; 0 without rotary parameters.
  static int64_t StateBytes(const PromptSpec& spec);

  // The last kept key of every head is turned to the position largest_kept_tokens() - 1, each
  // earlier one to the position before. Of the layer's `tokens` keys, `kept` at `rows` ([kept] or
  // [kv_heads, kept]) stay. Where the layer holds skeleton rows, `held` are its tokens ([tokens]),
  // else it is empty.
  LayerRotation ForLayer(absl::Span<const int32_t> rows, int64_t kept, int64_t tokens,
                         absl::Span<const int32_t> held) const;

 private:
  const RotaryPairing pairing_;
  const int64_t offset_;
  const int64_t end_;              // one past the last position
  const std::vector<float> from_;  // [pairs]
  const std::vector<float> to_;    // [pairs]
};

}  // namespace structkv::engine
