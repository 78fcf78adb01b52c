// What gRPC's names of addresses say of who can reach them; the service and its clients must agree.
#pragma once

#include "absl/strings/match.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"

namespace structkv::wire {

// Whether gRPC takes it for a unix socket.
inline bool IsUnixAddress(absl::string_view address) {
  return absl::StartsWith(address, "unix:") || absl::StartsWith(address, "unix-abstract:");
}

// Whether it is "host:port" of this host's own: nothing to or from it can be read on the way.
inline bool IsLoopbackAddress(absl::string_view address) {
  for (absl::string_view scheme : {"ipv4:", "ipv6:", "dns:///", "dns:"}) {
    if (absl::ConsumePrefix(&address, scheme)) break;
  }
  const absl::string_view host = address.substr(0, address.rfind(':'));
  const bool numeric = host.find_first_not_of("0123456789.") == absl::string_view::npos;
  return (numeric && absl::StartsWith(host, "127.")) || host == "[::1]" || host == "localhost";
}

}  // namespace structkv::wire
