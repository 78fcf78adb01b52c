// What this server can do, for `GetCapabilities`, and how much it has to do, for `GetLoad`.
#pragma once

#include <cstdint>
#include <string>

#include "service/session/session.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::rpc {

// `region_socket`: where descriptors are registered; empty: nowhere.
v1::GetCapabilitiesResponse MakeCapabilities(const session::SessionManager& sessions,
                                             int64_t max_message_bytes,
                                             const std::string& region_socket = "");

v1::GetLoadResponse MakeLoad(const session::SessionManager& sessions);

}  // namespace structkv::rpc
