// Synthetic prompts of any geometry.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "structkv/arena.h"
#include "structkv/bytes.h"
#include "structkv/session.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::cli {

// How a known model attends.
struct KnownModel {
  v1::ModelGeometry geometry;
  std::optional<double> attention_scale;  // none: 1 / sqrt(key_dim)
};

// For instance "llama-3.1-8b". NOT_FOUND lists the names.
absl::StatusOr<KnownModel> ModelByName(const std::string& name);
std::vector<std::string> GeometryNames();

// Has `open`'s keys and values lie in blocks of `block_tokens`, as many as the prompt needs, in an
// order that `seed` chooses.
void PageAtRandom(uint32_t block_tokens, uint64_t seed, v1::Open* open);

// Tensors with random elements, made once and given out for every layer and prompt, so that a
// prompt of any size takes the memory of one layer: keys, values and saliency are one layer's,
// window queries differ from layer to layer. The window's log-sum-exp is not made.
class SyntheticPrompt {
 public:
  // Gives memory, aligned to 64 bytes, for tensors.
  using Allocator = std::function<client::Bytes(size_t size)>;

  // Bytes that the tensors take.
  static uint64_t SizeOf(const v1::Open& open, const v1::Opened& opened);
  // In memory that `allocate` gives.
  SyntheticPrompt(const v1::Open& open, const v1::Opened& opened, uint64_t seed,
                  const Allocator& allocate = AllocateOnHeap);

  // Moves the tensors into the memory of a GPU that `arena` has.
  absl::Status MoveTo(client::Arena* arena);

  client::LayerTensors Layer(uint32_t layer) const;
  // Memory that the tensors take.
  uint64_t resident_bytes() const { return data_.size(); }

 private:
  // Of each tensor of one layer; the scales of values are those of keys.
  struct Sizes {
    Sizes(const v1::Open& open, const v1::Opened& opened);
    uint64_t keys, values, saliency, scales, queries;
    bool value_scales;
  };
  static client::Bytes AllocateOnHeap(size_t size);
  absl::Span<std::byte> Take(uint64_t* at, uint64_t size) const;

  const Sizes sizes_;
  client::Bytes data_;  // keys, values, saliency, scales, then each layer's queries
};

}  // namespace structkv::cli
