// The keys of a tile as the score kernels want them: rows a fixed stride apart, of a dtype they
// take.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/kernel_table.h"
#include "kernels/tensor.h"

namespace structkv::cpu {

// Dense keys are one piece and stay where they lie. Those of a paged tensor are copied side by
// side, and for kernels of bf16 pairs 8-bit ones widened, so many tokens at a time that they are
// still in the first-level cache when they are scored. Pieces change nothing of what the kernels
// compute: they take one token after the other.
class KeyPieces {
 public:
  // Tokens begin .. begin + tokens of a head, at most kTileTokens. `pairs`: for bf16 pairs.
  KeyPieces(const KernelTable& table, const TensorView& keys, bool pairs, int64_t head,
            int64_t begin, int64_t tokens);

  // Fills in the keys of the next piece and moves `out` and `out_after` behind the last one's. On
  // the first call `tile` holds everything else. False: there is none left.
  bool Next(ScoreTile* tile);

 private:
  // Of the score kernels; a piece is a multiple.
  static constexpr int64_t kBlock = 12;
  // A block of the widest keys, 32-bit ones of 576 elements; of others fewer bytes, about half of a
  // first-level cache.
  static constexpr int64_t kMostBytes = kBlock * 576 * 4;
  static constexpr int64_t kTargetBytes = kMostBytes / 2;
  static constexpr int64_t kMostTokens = 48;

  // Finds where the tile's keys lie, and as many after it as are asked for ahead.
  void FindRows(const TensorView& keys, int64_t head, int64_t begin);

  void (*const copy_)(const KeyRows& rows);  // null: keys stay where they lie
  ScoreTile dense_;                          // its keys, where they stay
  const DType source_;                       // as the keys lie
  const DType dtype_;                        // as the kernels read them
  const int64_t dim_;
  int64_t most_ = 0;    // tokens of a piece
  int64_t ahead_ = 0;   // tokens from one that is scored to one that is asked for
  int64_t done_ = 0;    // tokens of the pieces so far
  int64_t before_ = 0;  // tokens of the last piece
  const int64_t tokens_;
  const std::byte* rows_[2 * kTileTokens];
  alignas(64) std::byte copied_[kMostBytes];
};

}  // namespace structkv::cpu
