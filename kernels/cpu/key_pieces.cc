#include "kernels/cpu/key_pieces.h"

#include <algorithm>
#include <cstring>

namespace structkv::cpu {

bool KeyPieces::Next(ScoreTile* tile) {
  tile->out += before_ * tile->rows;
  if (tile->out_after != nullptr) tile->out_after += before_ * tile->rows;
  if (token_ == end_) return false;
  const int64_t row_bytes = keys_.dim * static_cast<int64_t>(DTypeSize(keys_.dtype));
  tile->dtype = keys_.dtype;
  tile->dim = keys_.dim;
  if (!keys_.paged()) {
    tile->keys = keys_.Row(head_, token_);
    tile->token_stride_bytes = keys_.token_stride * static_cast<int64_t>(DTypeSize(keys_.dtype));
    tile->tokens = end_ - token_;
    tile->tokens_after = keys_.tokens - end_;
  } else {
    const int64_t most = std::min(kMostTokens, kBytes / row_bytes / 12 * 12);
    tile->keys = rows_;
    tile->token_stride_bytes = row_bytes;
    tile->tokens = std::min(most, end_ - token_);
    tile->tokens_after = 0;
    for (int64_t i = 0; i < tile->tokens; ++i) {
      std::memcpy(rows_ + i * row_bytes, keys_.Row(head_, token_ + i),
                  static_cast<size_t>(row_bytes));
    }
  }
  before_ = tile->tokens;
  token_ += before_;
  return true;
}

}  // namespace structkv::cpu
