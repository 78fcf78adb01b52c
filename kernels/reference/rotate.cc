#include "kernels/reference/rotate.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/reference/element.h"

namespace structkv::reference {
namespace {

// The angle of one pair; the products are float32's.
double Angle(const RotationParams& rotation, int64_t pair, int64_t position, int64_t new_position) {
  const float to = rotation.to[pair] * static_cast<float>(new_position);
  const float from = rotation.from[pair] * static_cast<float>(position);
  return static_cast<double>(to) - static_cast<double>(from);
}

void RotateRow(const RotationParams& rotation, int64_t position, int64_t new_position, DType dtype,
               std::byte* row) {
  const bool halves = rotation.pairing == RotaryPairing::kHalfSplit;
  const bool stays = position == new_position &&
                     std::equal(rotation.from, rotation.from + rotation.pairs, rotation.to);
  for (int64_t j = 0; j < rotation.pairs && !stays; ++j) {
    const double angle = Angle(rotation, j, position, new_position);
    const int64_t first = rotation.offset + (halves ? j : 2 * j);
    const int64_t second = first + (halves ? rotation.pairs : 1);
    const double x = Element(row, dtype, first);
    const double y = Element(row, dtype, second);
    SetElement(row, dtype, first, x * std::cos(angle) - y * std::sin(angle));
    SetElement(row, dtype, second, y * std::cos(angle) + x * std::sin(angle));
  }
}

}  // namespace

void GatherRotated(const TensorView& source, const int32_t* rows, bool per_head,
                   const RotationParams& rotation, const MutableTensorView& destination) {
  const int64_t kept = destination.tokens;
  const size_t bytes = static_cast<size_t>(source.dim) * DTypeSize(source.dtype);
  for (int64_t h = 0; h < source.heads; ++h) {
    for (int64_t i = 0; i < kept; ++i) {
      const int64_t index = (per_head ? h * kept : 0) + i;
      std::byte* row = destination.Row(h, i);
      std::memcpy(row, source.Row(h, rows[index]), bytes);
      RotateRow(rotation, rotation.positions[index], rotation.first_position + i, source.dtype,
                row);
    }
  }
}

}  // namespace structkv::reference
