// The engine inside this process, behind the same interface as a server.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "client/cli/compressor.h"

namespace structkv::cli {

// `backend` as in the registry; `threads` 0: one per core.
absl::StatusOr<std::unique_ptr<Compressor>> MakeInProcessCompressor(const std::string& backend,
                                                                    int threads);

}  // namespace structkv::cli
