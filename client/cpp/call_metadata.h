// What a call says of itself as gRPC metadata.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "grpcpp/client_context.h"
#include "structkv/options.h"

namespace structkv::client::internal {

inline void AddMetadata(const std::vector<std::pair<std::string, std::string>>& metadata,
                        const CallLabels& labels, grpc::ClientContext* context) {
  for (const auto& [key, value] : metadata) context->AddMetadata(key, value);
  for (const auto& [key, value] : {std::pair("structkv-session-id", &labels.session_id),
                                   std::pair("traceparent", &labels.traceparent),
                                   std::pair("tracestate", &labels.tracestate)}) {
    if (!value->empty()) context->AddMetadata(key, *value);
  }
}

}  // namespace structkv::client::internal
