// Shapes and types of a prompt's tensors, as they follow from `Open` and `Opened`.
#pragma once

#include <cstdint>

#include "structkv/v1/compression.pb.h"
#include "tensor.h"

namespace structkv::python {

// The element type of a tensor of `open`.
const Element& ElementOf(const v1::Open& open, v1::Tensor tensor);

// On the way to the server, of a layer or a chunk that has `tokens`. `whole`: with keys and values
// in all blocks of `Open.paged`, not in those that `tokens` fill.
Shape InputShape(const v1::Open& open, const v1::Opened& opened, v1::Tensor tensor, uint32_t tokens,
                 bool whole);

// On the way back, where each KV head keeps `kept` tokens. Of saliency and the centrality, `kept`
// are the tokens of the layer.
Shape OutputShape(const v1::Open& open, const v1::Opened& opened, v1::Tensor tensor, uint32_t kept);

}  // namespace structkv::python
