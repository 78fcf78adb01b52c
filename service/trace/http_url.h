// An http:// or https:// URL, taken apart.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace structkv::trace {

struct HttpUrl {
  bool tls = false;
  std::string host;         // a name or an address, IPv6 without its brackets
  std::string port = "80";  // or "443"
  std::string path = "/";   // with the query

  // As the header Host has it.
  std::string authority() const;
};

// INVALID_ARGUMENT for anything but http[s]://HOST[:PORT][/PATH].
absl::StatusOr<HttpUrl> ParseHttpUrl(absl::string_view text);

}  // namespace structkv::trace
