// The piece map against a map of bytes. The input: the tensor's size, then offset and size of
// pieces.
#include <optional>
#include <vector>

#include "service/session/piece_map.h"
#include "tests/fuzz/fuzz_input.h"

namespace structkv::session {
namespace {

void Run(fuzz::FuzzInput input) {
  const int64_t tensor_bytes = input.Short() + 1;
  std::vector<int64_t> begin_of(static_cast<size_t>(tensor_bytes), -1);  // of each byte's piece
  std::vector<int64_t> size_of(static_cast<size_t>(tensor_bytes));       // of the piece from there
  int64_t pieces = 0;
  int64_t bytes = 0;
  PieceMap map;
  while (!input.empty()) {
    const auto offset = static_cast<int64_t>(input.Short()) - 16;
    int64_t size = input.Byte();
    if (size == 255) size = INT64_MAX - input.Byte();
    const absl::StatusOr<std::optional<PieceDigest>> found =
        map.Find(tensor_bytes, offset, size, "t");

    const bool inside = size > 0 && offset >= 0 && size <= tensor_bytes - offset;
    bool overlaps = false;
    for (int64_t i = offset; inside && i < offset + size; ++i) {
      overlaps |= begin_of[static_cast<size_t>(i)] >= 0;
    }
    const bool known = inside && begin_of[static_cast<size_t>(offset)] == offset &&
                       size_of[static_cast<size_t>(offset)] == size;
    const bool is_new = inside && !overlaps && pieces < PieceMap::MaxPieces(tensor_bytes);
    FUZZ_CHECK(found.ok() == (known || is_new));
    if (!found.ok()) {
      FUZZ_CHECK(absl::IsInvalidArgument(found.status()));
      continue;
    }
    FUZZ_CHECK(found->has_value() == known);
    if (known) {
      FUZZ_CHECK((**found == PieceDigest{static_cast<uint64_t>(offset * 3), size % 2 == 0}));
      continue;
    }
    map.Add(offset, size, {static_cast<uint64_t>(offset * 3), size % 2 == 0});
    for (int64_t i = offset; i < offset + size; ++i) begin_of[static_cast<size_t>(i)] = offset;
    size_of[static_cast<size_t>(offset)] = size;
    ++pieces;
    bytes += size;
    FUZZ_CHECK(map.bytes() == bytes);
  }
}

}  // namespace
}  // namespace structkv::session

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  structkv::session::Run({data, size});
  return 0;
}
