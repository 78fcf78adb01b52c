#include "kernels/cpu/gather.h"

#include <algorithm>

namespace structkv::cpu {
namespace {

// Bytes that one task copies, about.
constexpr int64_t kTaskBytes = int64_t{1} << 20;
// Keys and values that are larger than this push each other out of a last-level cache before anyone
// reads them there: they are better written past it.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

}  // namespace

void Gather(const KernelTable& table, const TensorView& source, const int32_t* positions,
            bool per_head, const MutableTensorView& destination, ParallelFor parallel) {
  const int64_t element = static_cast<int64_t>(DTypeSize(source.dtype));
  const int64_t kept = destination.tokens;
  int64_t heads = source.heads;
  int64_t row_bytes = source.dim * element;
  if (kept == 0 || heads == 0 || row_bytes == 0) return;
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
    table.copy_rows(
        {.heads = task_heads,
         .rows = std::min(task_rows, kept - begin),
         .row_bytes = row_bytes,
         .positions = positions + (per_head ? head * kept : 0) + begin,
         .position_stride = per_head ? kept : 0,
         .source = static_cast<const std::byte*>(source.data) + head * source.head_stride * element,
         .source_stride_bytes = source.token_stride * element,
         .source_head_stride_bytes = source.head_stride * element,
         .source_block_tokens = source.block_tokens,
         .source_block_stride_bytes = source.block_stride * element,
         .block_table = source.block_table,
         .destination = destination.Row(head, begin),
         .destination_stride_bytes = destination.token_stride * element,
         .destination_head_stride_bytes = destination.head_stride * element,
         .destination_block_tokens = destination.block_tokens,
         .destination_block_stride_bytes = destination.block_stride * element,
         .destination_place = destination.paged() ? begin % destination.block_tokens : 0,
         .stream = stream});
  });
}

}  // namespace structkv::cpu
