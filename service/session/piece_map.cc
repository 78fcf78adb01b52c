#include "service/session/piece_map.h"

#include <iterator>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace structkv::session {

absl::StatusOr<std::optional<PieceDigest>> PieceMap::Find(int64_t tensor_bytes, int64_t offset,
                                                          int64_t size,
                                                          absl::string_view name) const {
  if (size <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": pieces.data is empty at offset_bytes ", offset));
  }
  if (offset < 0 || size > tensor_bytes || offset > tensor_bytes - size) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, ": the piece of ", size, " bytes at offset_bytes ", static_cast<uint64_t>(offset),
        " leaves the tensor, which has ", tensor_bytes, " bytes"));
  }
  const auto next = pieces_.lower_bound(offset);  // the first that begins here or later
  if (next != pieces_.end() && next->first == offset && next->second.size == size) {
    return next->second.digest;
  }
  auto other = pieces_.end();
  if (next != pieces_.end() && next->first < offset + size) {
    other = next;
  } else if (next != pieces_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second.size > offset) other = before;
  }
  if (other != pieces_.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": the piece of ", size, " bytes at offset_bytes ", offset,
                     " overlaps the piece of ", other->second.size, " bytes at ", other->first));
  }
  const int64_t limit = MaxPieces(tensor_bytes);
  if (static_cast<int64_t>(pieces_.size()) >= limit) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": the piece at offset_bytes ", offset, " is one too many; a tensor of ",
                     tensor_bytes, " bytes may come in at most ", limit, " pieces"));
  }
  return std::nullopt;
}

void PieceMap::Add(int64_t offset, int64_t size, const PieceDigest& digest) {
  pieces_.emplace(offset, Record{size, digest});
  bytes_ += size;
}

}  // namespace structkv::session
