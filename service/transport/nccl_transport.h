// Tensors that come and go between two GPUs, by an NCCL pair.
#pragma once

#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "service/transport/nccl/hub.h"
#include "service/transport/negotiation.h"

namespace structkv::transport {

// Grants NCCL from the hubs of the GPUs that `backend` computes on; all outlive what is granted.
// NOT_FOUND where the request's pair is attached to none of them by its tenant;
// FAILED_PRECONDITION where it names none, rows are pulled, or the pair's GPU can never reserve
// what the request takes.
absl::StatusOr<std::shared_ptr<Transport>> GrantNccl(absl::Span<nccl::Hub* const> hubs,
                                                     const Backend& backend,
                                                     const TransportRequest& request,
                                                     const PromptSizes& sizes);

}  // namespace structkv::transport
