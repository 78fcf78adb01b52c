// Whose call it is.
#pragma once

#include <cstddef>
#include <string>

#include "absl/status/statusor.h"
#include "grpcpp/server_context.h"

namespace structkv::rpc {

// Request metadata that names the tenant where the transport authenticates nobody.
inline constexpr char kTenantKey[] = "structkv-tenant";
inline constexpr size_t kMaxTenantBytes = 128;

// The first identity of an authenticated peer; otherwise what the metadata say, by default the
// empty tenant. The two never meet. INVALID_ARGUMENT where the metadata's is too long.
absl::StatusOr<std::string> TenantOf(const grpc::ServerContextBase& context);

}  // namespace structkv::rpc
