// Where the server writes results that go into a region (`Open.result_range`).
#pragma once

#include <cstdint>

#include "structkv/v1/compression.pb.h"

namespace structkv::client::internal {

// Whether tensors lie in regions, which both ends have.
inline bool InRegions(v1::Transport transport) {
  return transport == v1::TRANSPORT_SHARED_MEMORY || transport == v1::TRANSPORT_CUDA_IPC;
}

// Where a layer's kept TENSOR_KEYS or TENSOR_VALUES begin, from the range's begin.
uint64_t ResultOffset(const v1::Open& open, const v1::Opened& opened, uint32_t layer,
                      v1::Tensor tensor);

// Bytes of the range that the results of `layers` layers take.
uint64_t ResultBytes(const v1::Open& open, const v1::Opened& opened, uint32_t layers);

}  // namespace structkv::client::internal
