// What `--check-config` does.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "service/config.h"

namespace structkv {

// Whether a server could be started so, as far as that can be said without listening, computing or
// writing: options that must agree, the syntax of addresses, certificates, keys and authorities,
// the token file. Reads files. A report for people, one line for each thing that was looked at; the
// first fault otherwise, as Server::Start would give it.
absl::StatusOr<std::string> CheckConfig(const Config& config);

}  // namespace structkv
