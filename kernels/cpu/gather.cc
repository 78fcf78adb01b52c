#include "kernels/cpu/gather.h"

#include <algorithm>
#include <cstring>

namespace structkv::cpu {
namespace {

// Bytes that one task copies, about.
constexpr int64_t kTaskBytes = int64_t{1} << 20;
// Keys and values that are larger than this push each other out of a last-level cache before anyone
// reads them there: they are better written past it.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Where blocks scatter the rows of one side or both.
void GatherPaged(const TensorView& source, const int32_t* positions, bool per_head,
                 const MutableTensorView& destination, ParallelFor parallel) {
  const int64_t kept = destination.tokens;
  const int64_t row_bytes = source.dim * static_cast<int64_t>(DTypeSize(source.dtype));
  const int64_t task_rows = std::max<int64_t>(1, kTaskBytes / (row_bytes * source.heads));
  parallel((kept + task_rows - 1) / task_rows, [&](int64_t task) {
    const int64_t end = std::min(kept, (task + 1) * task_rows);
    for (int64_t i = task * task_rows; i < end; ++i) {
      for (int64_t h = 0; h < source.heads; ++h) {
        const int32_t position = positions[(per_head ? h * kept : 0) + i];
        std::memcpy(destination.Row(h, i), source.Row(h, position), static_cast<size_t>(row_bytes));
      }
    }
  });
}

}  // namespace

void Gather(const KernelTable& table, const TensorView& source, const int32_t* positions,
            bool per_head, const MutableTensorView& destination, ParallelFor parallel) {
  const int64_t element = static_cast<int64_t>(DTypeSize(source.dtype));
  const int64_t kept = destination.tokens;
  int64_t heads = source.heads;
  int64_t row_bytes = source.dim * element;
  if (kept == 0 || heads == 0 || row_bytes == 0) return;
  if (source.paged() || destination.paged()) {
    return GatherPaged(source, positions, per_head, destination, parallel);
  }
  const bool stream = heads * kept * row_bytes >= kStreamBytes;
  int64_t task_heads = 1;
  if (destination.head_stride == source.dim) {
    if (!per_head && source.head_stride == source.dim) {
      // A token's heads lie side by side in both, and all keep the same tokens: they are one row.
      row_bytes *= heads;
      heads = 1;
    } else {
      task_heads = heads;
    }
  }
  const int64_t task_rows = std::max<int64_t>(1, kTaskBytes / (row_bytes * task_heads));
  const int64_t tasks = (kept + task_rows - 1) / task_rows;
  parallel(heads / task_heads * tasks, [&](int64_t task) {
    const int64_t head = task / tasks;
    const int64_t begin = task % tasks * task_rows;
    table.copy_rows({.heads = task_heads,
                     .rows = std::min(task_rows, kept - begin),
                     .row_bytes = row_bytes,
                     .positions = positions + (per_head ? head * kept : 0) + begin,
                     .position_stride = per_head ? kept : 0,
                     .source = source.Row(head, 0),
                     .source_stride_bytes = source.token_stride * element,
                     .source_head_stride_bytes = source.head_stride * element,
                     .destination = destination.Row(head, begin),
                     .destination_stride_bytes = destination.token_stride * element,
                     .destination_head_stride_bytes = destination.head_stride * element,
                     .stream = stream});
  });
}

}  // namespace structkv::cpu
