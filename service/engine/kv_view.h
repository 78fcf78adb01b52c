// A layer's keys or values as the backend takes them.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"
#include "service/engine/prompt_spec.h"

namespace structkv::engine {

// A view of `data`, [kv_heads, tokens, dim] in the spec's layout, dense or paged. `in_order`:
// blocks are not those of the prompt's table but lie one after the other, as in a layer of skeleton
// rows. The view lives as long as the spec's table.
inline TensorView KvView(const PromptSpec& spec, const void* data, int64_t dim, int64_t tokens,
                         bool in_order) {
  const int64_t heads = spec.geometry.kv_heads;
  if (!spec.paged.has_value()) {
    return TensorView::Dense(data, spec.dtype, spec.layout, heads, tokens, dim);
  }
  return TensorView::Paged(data, spec.dtype, spec.layout, heads, tokens, dim,
                           in_order ? nullptr : spec.paged->block_table->data(),
                           spec.paged->block_tokens);
}

}  // namespace structkv::engine
