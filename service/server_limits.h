// What a server's options mean to gRPC.
#pragma once

#include "grpcpp/server_builder.h"
#include "service/server.h"

namespace structkv {

// Limits of messages, streams, metadata, handshakes, pings and connections.
void SetLimits(const ServerOptions& options, grpc::ServerBuilder* builder);

}  // namespace structkv
