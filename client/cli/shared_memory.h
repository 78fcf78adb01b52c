// Memory that the commands share with a server, of the host or of a GPU.
#pragma once

#include <cstdint>
#include <memory>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "client/cli/compressor.h"
#include "structkv/arena.h"
#include "structkv/options.h"

namespace structkv::cli {

// --transport, --gpu and --cuda-library.
void AddTransportFlag(CLI::App* app, ConnectionFlags* flags);

// An arena of `bytes` for the flags' transport; null where that is inline, or, with auto, where
// there is no such room.
absl::StatusOr<std::shared_ptr<client::Arena>> MakeArena(const ConnectionFlags& flags,
                                                         uint64_t bytes);

// Has a session keep in `arena`, unless it is null, what it cannot name where it lies, and its
// results where the host can read them.
void UseArena(const std::shared_ptr<client::Arena>& arena, client::SessionOptions* options);

}  // namespace structkv::cli
