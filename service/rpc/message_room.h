// How much of a tensor fits into a message.
#pragma once

#include <google/protobuf/message_lite.h>

#include <algorithm>
#include <cstdint>

#include "structkv/v1/piece_codec.h"

namespace structkv::rpc {

// What is left of one message, beside a header, for pieces.
class MessageRoom {
 public:
  MessageRoom(int64_t max_message_bytes, const google::protobuf::MessageLite& header)
      : free_(max_message_bytes - kHeaderSlack - static_cast<int64_t>(header.ByteSizeLong())) {}

  // Bytes that the next piece takes of a tensor of which `rest` are left: all of them, or whole
  // cuts; 0: the message is full.
  int64_t Take(int64_t rest) {
    const int64_t fits = std::min(rest, free_ - kPiece);
    const int64_t take = fits == rest ? fits : fits / kCutBytes * kCutBytes;
    if (take <= 0) return 0;
    free_ -= take + kPiece;
    return take;
  }
  // Whether there is room for a piece without data, with a key that long, which is taken.
  bool TakeElsewhere(size_t key_bytes) {
    const int64_t piece = kPiece + static_cast<int64_t>(key_bytes);
    if (free_ < piece) return false;
    free_ -= piece;
    return true;
  }

 private:
  static constexpr auto kPiece = static_cast<int64_t>(wire::kPieceOverheadBytes);
  // Pieces are cut at multiples of this, so that a piece holds whole elements.
  static constexpr int64_t kCutBytes = 64;
  // The outer field's key and length, and the flag of the last message.
  static constexpr int64_t kHeaderSlack = 32;

  int64_t free_;
};

}  // namespace structkv::rpc
