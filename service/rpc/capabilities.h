// What this server can do, for `GetCapabilities`.
#pragma once

#include <cstdint>

#include "service/session/session.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::rpc {

v1::GetCapabilitiesResponse MakeCapabilities(const session::SessionManager& sessions,
                                             int64_t max_message_bytes);

}  // namespace structkv::rpc
