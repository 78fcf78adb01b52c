// Backends by name.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace structkv {

// Names of the backends in this build, best first.
std::vector<std::string_view> BackendNames();

// Makes a backend. "auto" is the best of this machine. NOT_FOUND, with the known names, otherwise.
absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(std::string_view name);

}  // namespace structkv
