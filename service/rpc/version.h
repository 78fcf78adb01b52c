// The version of this build.
#pragma once

namespace structkv::rpc {

inline constexpr char kVersion[] = STRUCTKV_VERSION;

}  // namespace structkv::rpc
