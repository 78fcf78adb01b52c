#include "kernels/cpu/key_pieces.h"

#include <algorithm>

namespace structkv::cpu {

KeyPieces::KeyPieces(const KernelTable& table, const TensorView& keys, bool pairs, int64_t head,
                     int64_t begin, int64_t tokens)
    : copy_(pairs && IsFp8(keys.dtype) ? table.fp8_to_bf16
            : keys.paged()             ? table.copy_keys
                                       : nullptr),
      source_(keys.dtype),
      dtype_(pairs ? DType::kBF16 : keys.dtype),
      dim_(keys.dim),
      tokens_(tokens) {
  if (copy_ == nullptr) {
    dense_.keys = keys.Row(head, begin);
    dense_.token_stride_bytes = keys.token_stride * static_cast<int64_t>(DTypeSize(source_));
    dense_.tokens_after = keys.tokens - begin - tokens;
    return;
  }
  const int64_t row_bytes = dim_ * static_cast<int64_t>(DTypeSize(dtype_));
  most_ = std::clamp(kTargetBytes / row_bytes / kBlock * kBlock, kBlock, kMostTokens);
  const int64_t source_bytes = dim_ * static_cast<int64_t>(DTypeSize(source_));
  ahead_ = std::min(2 * kKeysFarBytes / source_bytes, kTileTokens);
  FindRows(keys, head, begin);
}

void KeyPieces::FindRows(const TensorView& keys, int64_t head, int64_t begin) {
  const int64_t wanted = tokens_ + ahead_;
  const int64_t there = std::min(wanted, keys.tokens - begin);
  const int64_t step = keys.token_stride * static_cast<int64_t>(DTypeSize(source_));
  for (int64_t i = 0; i < there;) {
    // One look at the table for each block.
    const int64_t token = begin + i;
    const int64_t in_block =
        keys.paged() ? keys.block_tokens - token % keys.block_tokens : there - i;
    const int64_t end = std::min(there, i + in_block);
    for (const std::byte* row = keys.Row(head, token); i < end; ++i, row += step) rows_[i] = row;
  }
  // Once more is no harm.
  std::fill(rows_ + there, rows_ + wanted, rows_[there - 1]);
}

bool KeyPieces::Next(ScoreTile* tile) {
  const int64_t moved = before_ * tile->rows * tile->out_element_bytes;
  tile->out = static_cast<std::byte*>(tile->out) + moved;
  if (tile->out_after != nullptr) tile->out_after += moved;
  if (done_ == tokens_) return false;
  tile->dtype = dtype_;
  tile->dim = dim_;
  if (copy_ == nullptr) {
    tile->keys = dense_.keys;
    tile->token_stride_bytes = dense_.token_stride_bytes;
    tile->tokens_after = dense_.tokens_after;
    tile->tokens = tokens_;
  } else {
    tile->keys = copied_;
    tile->token_stride_bytes = dim_ * static_cast<int64_t>(DTypeSize(dtype_));
    tile->tokens = std::min(most_, tokens_ - done_);
    tile->ask = rows_ + done_ + ahead_;
    tile->ask_element_bytes = static_cast<int64_t>(DTypeSize(source_));
    copy_({.rows = rows_ + done_,
           .tokens = tile->tokens,
           .dtype = source_,
           .dim = dim_,
           .out = copied_});
  }
  before_ = tile->tokens;
  done_ += before_;
  return true;
}

}  // namespace structkv::cpu
