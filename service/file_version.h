// Whether a file is still the one that was read.
#pragma once

#include <string>

namespace structkv {

// Another text once the file was changed or replaced, also by way of a link (a mounted ConfigMap or
// Secret); empty where there is none.
std::string FileVersion(const std::string& path);

}  // namespace structkv
