// The standard health service, asked over the wire without generated code.
#pragma once

#include <memory>
#include <string>

#include "grpcpp/channel.h"

namespace structkv::testkit {

// "SERVING", "NOT_SERVING", "UNKNOWN", "SERVICE_UNKNOWN", or the code and text of the failed call.
// `service` empty: the server as a whole.
std::string Health(const std::shared_ptr<grpc::Channel>& channel, const std::string& service = "");

// Names of the services that reflection lists; empty where the call fails.
std::string ReflectedServices(const std::shared_ptr<grpc::Channel>& channel);

}  // namespace structkv::testkit
