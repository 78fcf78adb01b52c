#include "kernels/cpu/query_pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace structkv::cpu {

std::optional<BadRow> PackQueries(const KernelTable& table, const SaliencyParams& params,
                                  const SaliencyPlan& plan, int64_t head, int64_t block,
                                  float* packed) {
  const TensorView& q = params.queries;
  const int64_t group = q.heads / params.keys.heads;
  const int64_t rows = plan.Rows(block);
  const int64_t padded = plan.PaddedRows(block);
  const bool negate = params.scale < 0;
  std::fill(packed, packed + plan.packed_floats, 0.0F);
  std::vector<float> row(q.dim);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t index = block * kRowBlock + i;
    const int64_t query_head = head * group + index / plan.window;
    const std::byte* source = q.Row(query_head, index % plan.window);
    table.to_f32(source, q.dtype, q.dim, row.data());
    for (float value : row) {
      if (!std::isfinite(value)) return BadRow{query_head, index % plan.window, value};
    }
    if (plan.pairs) {
      for (int64_t p = 0; p < q.dim / 2; ++p) {
        uint32_t pair;
        std::memcpy(&pair, source + 4 * p, sizeof(pair));
        if (negate) pair ^= 0x80008000U;
        std::memcpy(packed + p * padded + i, &pair, sizeof(pair));
      }
    } else {
      for (int64_t e = 0; e < q.dim; ++e) packed[e * padded + i] = negate ? -row[e] : row[e];
    }
  }
  return std::nullopt;
}

}  // namespace structkv::cpu
