// Which bytes of one tensor have come, piece by piece.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/container/btree_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace structkv::session {

// What tells a piece's bytes from others.
struct PieceDigest {
  uint64_t xxh3 = 0;
  bool sampled = false;  // of a part of the bytes alone

  bool operator==(const PieceDigest&) const = default;
};

// Not thread-safe.
class PieceMap {
 public:
  // Bookkeeping of one piece, at most (an entry of a half-empty tree node).
  static constexpr int64_t kBytesPerPiece = 64;

  // Pieces that a tensor may come in: plenty for a prefill in chunks, and a bound on what is kept
  // here. 1,024, and one for each 16 KiB.
  static constexpr int64_t MaxPieces(int64_t tensor_bytes) { return 1024 + tensor_bytes / 16384; }

  // What is known of a piece before its bytes are read: nullopt where it is new, or else what
  // the same piece was added with.
  //   INVALID_ARGUMENT  the piece is empty, leaves the tensor, overlaps a different one, or is one
  //                     too many; the text begins with `name`
  absl::StatusOr<std::optional<PieceDigest>> Find(int64_t tensor_bytes, int64_t offset,
                                                  int64_t size, absl::string_view name) const;

  // Records a piece for which Find said that it is new.
  void Add(int64_t offset, int64_t size, const PieceDigest& digest);

  // Bytes recorded; all of the tensor once this equals its size, as pieces do not overlap.
  int64_t bytes() const { return bytes_; }

 private:
  struct Record {
    int64_t size = 0;
    PieceDigest digest;
  };
  absl::btree_map<int64_t, Record> pieces_;  // by offset
  int64_t bytes_ = 0;
};

}  // namespace structkv::session
