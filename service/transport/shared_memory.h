// Tensors in regions that the client has registered: read, and written, where they lie.
#pragma once

#include <memory>

#include "service/transport/negotiation.h"
#include "service/transport/region_registry.h"

namespace structkv::transport {

// Regions that a prompt may name.
inline constexpr size_t kMaxPromptRegions = 64;

// Bytes from one layer's results to the next one's, where they are written into a region: keys,
// then values, each from a multiple of kRangeAlignment on. None overflows for a valid prompt.
uint64_t ResultStride(const ResultSizes& sizes);

// Grants shared memory from `registry`, which outlives the call. FAILED_PRECONDITION where the
// prompt names no regions, or one of them is broken; NOT_FOUND for a handle that is not
// registered; INVALID_ARGUMENT where the range of results does not fit.
absl::StatusOr<std::shared_ptr<const Transport>> GrantSharedMemory(RegionRegistry& registry,
                                                                   const TransportRequest& request,
                                                                   const ResultSizes& sizes);

}  // namespace structkv::transport
