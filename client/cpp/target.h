// What the target of a client stands for.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace structkv::client::internal {

// Where a server is.
struct ReplicaAddress {
  std::string address;  // as gRPC takes it
  std::string name;     // that its certificate must have, of one that was looked up; empty: its own
};

// Of a list "a:1,b:2" or a name "dns:///c:3", both or one.
struct Target {
  std::vector<std::string> fixed;  // addresses, each once
  std::vector<std::string> names;  // "name:port", to be looked up

  bool several() const { return !names.empty() || fixed.size() > 1; }
};

// Whether `address` is "1.2.3.4:port" or "[1::2]:port".
bool IsIpAddress(absl::string_view address);

// The host of "name:port".
std::string HostOf(const std::string& name);

// INVALID_ARGUMENT for an empty address, and for a name without a port.
absl::StatusOr<Target> ParseTarget(absl::string_view target);

// All addresses of "name:port": those of IPv4 where there are any, since hosts with both would come
// twice, otherwise those of IPv6. Blocks. UNAVAILABLE where there are none.
absl::StatusOr<std::vector<ReplicaAddress>> LookUp(const std::string& name);

}  // namespace structkv::client::internal
