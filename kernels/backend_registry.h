// Backends by name.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace structkv {

// Names of the backends in this build, best first. "cuda" is there where nvcc was.
std::vector<std::string_view> BackendNames();

struct BackendOptions {
  // Memory taken of each GPU (kernels/cuda/cuda_backend.h); 0: half of what is free.
  int64_t device_memory_bytes = 0;
  std::optional<int64_t> reserve_bytes;
  // Is told what an operator should know, on any thread; may be null.
  std::function<void(const std::string&)> warn;
};

struct ChosenBackend {
  std::unique_ptr<Backend> backend;
  // Why this one, for people.
  std::string reason;
};

// Makes a backend. "auto" is the best that this machine can run, and never fails for want of a
// better one. NOT_FOUND, with the known names, for any other name; what keeps the one named from
// running otherwise.
absl::StatusOr<ChosenBackend> ChooseBackend(std::string_view name, BackendOptions options = {});
// The same, for whoever does not ask why.
absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(std::string_view name);

}  // namespace structkv
