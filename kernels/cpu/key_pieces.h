// The keys of a tile as the score kernels want them: rows a fixed stride apart, of one dtype.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/kernel_table.h"
#include "kernels/tensor.h"

namespace structkv::cpu {

// Dense keys are one piece and stay where they lie. Those of a paged tensor are copied side by
// side, so many tokens at a time that they are still in the first-level cache when they are scored.
// Pieces never change what the kernels compute: they take one token after the other.
class KeyPieces {
 public:
  // Tokens begin .. begin + tokens of a head; at most kTileTokens.
  KeyPieces(const TensorView& keys, int64_t head, int64_t begin, int64_t tokens)
      : keys_(keys), head_(head), token_(begin), end_(begin + tokens) {}

  // Fills in the keys of the next piece and moves `out` and `out_after` behind the last one's. On
  // the first call `tile` holds everything else. False: there is none left.
  bool Next(ScoreTile* tile);

 private:
  // Two blocks of the widest keys that are copied, 32-bit ones of 576 elements.
  static constexpr int64_t kBytes = 24 * 576 * 4;
  static constexpr int64_t kMostTokens = 48;

  const TensorView& keys_;
  const int64_t head_;
  int64_t token_;
  const int64_t end_;
  int64_t before_ = 0;  // tokens of the last piece
  alignas(64) std::byte rows_[kBytes];
};

}  // namespace structkv::cpu
