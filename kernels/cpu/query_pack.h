// Query rows as the score kernels want them: transposed, padded with zero rows.
#pragma once

#include <cstdint>
#include <optional>

#include "kernels/backend.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/saliency_plan.h"

namespace structkv::cpu {

// A query row that is not finite.
struct BadRow {
  int64_t query_head = 0;
  int64_t row = 0;
  float value = 0;
};

// Packs block `block` of KV head `head` into `packed`, [dim, padded rows] float32 or
// [dim / 2, padded rows] bf16 pairs, as the plan says. A negative scale turns the signs. Returns
// the first row that is not finite.
std::optional<BadRow> PackQueries(const KernelTable& table, const SaliencyParams& params,
                                  const SaliencyPlan& plan, int64_t head, int64_t block,
                                  float* packed);

}  // namespace structkv::cpu
