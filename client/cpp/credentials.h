// How a channel shows who its client is.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "grpcpp/security/credentials.h"
#include "structkv/options.h"

namespace structkv::client::internal {

// Of a channel to `target`. INVALID_ARGUMENT for a token that could be read on its way, or that no
// metadata can hold.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> CredentialsFor(
    const std::string& target, const ClientOptions& options);

}  // namespace structkv::client::internal
