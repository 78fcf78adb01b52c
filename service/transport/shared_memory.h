// Tensors in files that the client and the server have mapped.
#pragma once

#include <memory>

#include "service/transport/negotiation.h"
#include "service/transport/region_registry.h"

namespace structkv::transport {

// Grants shared memory from `registry`, which outlives the call. As UseRegions; FAILED_PRECONDITION
// also where a region is memory of a GPU.
absl::StatusOr<std::shared_ptr<Transport>> GrantSharedMemory(RegionRegistry& registry,
                                                             const TransportRequest& request,
                                                             const PromptSizes& sizes);

}  // namespace structkv::transport
