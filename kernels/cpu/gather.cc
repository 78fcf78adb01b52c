#include "kernels/cpu/gather.h"

#include <algorithm>

namespace structkv::cpu {
namespace {

// Bytes that one task copies, about.
constexpr int64_t kTaskBytes = int64_t{256} << 10;

}  // namespace

void Gather(const KernelTable& table, const TensorView& source, const int32_t* positions,
            bool per_head, const MutableTensorView& destination, ParallelFor parallel) {
  const int64_t element = static_cast<int64_t>(DTypeSize(source.dtype));
  const int64_t kept = destination.tokens;
  int64_t heads = source.heads;
  int64_t row_bytes = source.dim * element;
  if (kept == 0 || heads == 0 || row_bytes == 0) return;
  // Where a token's heads lie side by side in both, and all keep the same tokens, they are one row.
  if (!per_head && source.head_stride == source.dim && destination.head_stride == source.dim) {
    row_bytes *= heads;
    heads = 1;
  }
  const int64_t task_rows = std::max<int64_t>(1, kTaskBytes / row_bytes);
  const int64_t tasks = (kept + task_rows - 1) / task_rows;
  parallel(heads * tasks, [&](int64_t task) {
    const int64_t head = task / tasks;
    const int64_t begin = task % tasks * task_rows;
    table.copy_rows({.source = source.Row(head, 0),
                     .source_stride_bytes = source.token_stride * element,
                     .positions = positions + (per_head ? head * kept : 0) + begin,
                     .rows = std::min(task_rows, kept - begin),
                     .destination = destination.Row(head, begin),
                     .destination_stride_bytes = destination.token_stride * element,
                     .row_bytes = row_bytes});
  });
}

}  // namespace structkv::cpu
