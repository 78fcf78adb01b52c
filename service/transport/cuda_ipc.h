// Tensors in memory of a GPU that the client has exported.
#pragma once

#include <memory>

#include "kernels/imported_memory.h"
#include "service/transport/negotiation.h"
#include "service/transport/region_registry.h"

namespace structkv::transport {

// What a region of it consists of: all `bytes` of `imported`.
std::unique_ptr<RegionMemory> GpuRegion(std::unique_ptr<ImportedMemory> imported, int64_t bytes,
                                        bool writable);

// Grants CUDA IPC from `registry`, which outlives the call. As UseRegions; FAILED_PRECONDITION also
// where a region is memory of the host, the regions lie on several GPUs, or rows are pulled.
//
// Keys and values alone are read from ranges, and their bytes never by the host. What the client
// wrote is waited for by Await(); results need no event, since a backend's calls return once they
// are written.
absl::StatusOr<std::shared_ptr<Transport>> GrantCudaIpc(RegionRegistry& registry,
                                                        const TransportRequest& request,
                                                        const PromptSizes& sizes);

}  // namespace structkv::transport
