#include "kernels/cpu/rotate.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace structkv::cpu {
namespace {

// Kept tokens of one task.
constexpr int64_t kTaskRows = 64;
// Kept tokens whose keys are asked for ahead of their turn.
constexpr int64_t kRowsAhead = 2;

// The keys of some heads that stay at the same tokens.
class Mover {
 public:
  Mover(const KernelTable& table, const TensorView& source, const RotationParams& rotation,
        const MutableTensorView& destination)
      : table_(table),
        source_(source),
        rotation_(rotation),
        destination_(destination),
        same_frequencies_(std::equal(rotation.from, rotation.from + rotation.pairs, rotation.to)),
        element_(static_cast<int64_t>(DTypeSize(source.dtype))),
        cosines_(rotation.pairs),
        sines_(rotation.pairs) {}

  // Rows begin .. end of the heads; `rows` and `positions` are theirs.
  void Run(int64_t first_head, int64_t heads, const int32_t* rows, const int32_t* positions,
           int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t new_position = rotation_.first_position + i;
      const bool moves = positions[i] != new_position || !same_frequencies_;
      if (moves) FillAngles(positions[i], new_position);
      for (int64_t h = first_head; h < first_head + heads; ++h) {
        if (i + kRowsAhead < end) Prefetch(source_.Row(h, rows[i + kRowsAhead]));
        MoveRow(source_.Row(h, rows[i]), destination_.Row(h, i), moves);
      }
    }
  }

 private:
  void FillAngles(int64_t position, int64_t new_position) {
    table_.rotary_angles({.from = rotation_.from,
                          .to = rotation_.to,
                          .pairs = rotation_.pairs,
                          .position = position,
                          .new_position = new_position,
                          .cosines = cosines_.data(),
                          .sines = sines_.data()});
  }

  void Prefetch(const std::byte* row) const {
    for (int64_t b = 0; b < source_.dim * element_; b += 64) __builtin_prefetch(row + b);
  }

  void MoveRow(const std::byte* from, std::byte* to, bool moves) const {
    const int64_t before = rotation_.offset * element_;
    const int64_t after = (rotation_.offset + 2 * rotation_.pairs) * element_;
    const int64_t all = source_.dim * element_;
    if (!moves) {
      std::memcpy(to, from, static_cast<size_t>(all));
      return;
    }
    if (before > 0) std::memcpy(to, from, static_cast<size_t>(before));
    table_.rotate_row({.source = from + before,
                       .destination = to + before,
                       .dtype = source_.dtype,
                       .pairing = rotation_.pairing,
                       .pairs = rotation_.pairs,
                       .cosines = cosines_.data(),
                       .sines = sines_.data()});
    if (after < all) std::memcpy(to + after, from + after, static_cast<size_t>(all - after));
  }

  const KernelTable& table_;
  const TensorView& source_;
  const RotationParams& rotation_;
  const MutableTensorView& destination_;
  const bool same_frequencies_;
  const int64_t element_;
  std::vector<float> cosines_, sines_;
};

}  // namespace

void GatherRotated(const KernelTable& table, const TensorView& source, const int32_t* rows,
                   bool per_head, const RotationParams& rotation,
                   const MutableTensorView& destination, ParallelFor parallel) {
  const int64_t kept = destination.tokens;
  const int64_t blocks = (kept + kTaskRows - 1) / kTaskRows;
  // Heads that keep the same tokens share their angles.
  const int64_t task_heads = per_head ? 1 : source.heads;
  parallel(blocks * (source.heads / task_heads), [&](int64_t task) {
    const int64_t head = task / blocks * task_heads;
    const int64_t begin = task % blocks * kTaskRows;
    const int64_t set = per_head ? head * kept : 0;
    Mover(table, source, rotation, destination)
        .Run(head, task_heads, rows + set, rotation.positions + set, begin,
             std::min(kept, begin + kTaskRows));
  });
}

}  // namespace structkv::cpu
