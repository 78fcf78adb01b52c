// What this program was built from, and with.
#pragma once

#include <string>

namespace structkv {

// The revision of the sources: "017fc43", "017fc43+" with changes that are in no revision, or
// "unknown" where they came without their history.
std::string BuildRevision();

// For people: version, revision, backends, transports, and the libraries that matter.
std::string BuildInfo();

}  // namespace structkv
