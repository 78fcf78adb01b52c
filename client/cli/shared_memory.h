// Memory that the commands share with a server, of the host or of a GPU.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "client/cli/compressor.h"
#include "structkv/arena.h"
#include "structkv/nccl.h"
#include "structkv/options.h"
#include "structkv/result.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::cli {

// --transport, --gpu and the libraries that it needs.
void AddTransportFlag(CLI::App* app, ConnectionFlags* flags);

// As summaries name it.
std::string TransportText(v1::Transport transport);

struct SharedMemory {
  std::shared_ptr<client::Arena> arena;   // null: none
  std::shared_ptr<client::NcclGpu> nccl;  // for NCCL

  bool on_gpu() const { return arena != nullptr && arena->region()->on_gpu(); }
};

// An arena of `bytes` for the flags' transport; none where that is inline, or, with auto, where
// there is no such room.
absl::StatusOr<SharedMemory> MakeSharedMemory(const ConnectionFlags& flags, uint64_t bytes);

// Has a session keep in the arena, if there is one, what it cannot name where it lies, and its
// results.
void UseSharedMemory(const SharedMemory& memory, client::SessionOptions* options);

// The same with rows that lie in the host's memory.
absl::StatusOr<client::LayerResult> ToHost(const SharedMemory& memory, client::LayerResult layer);

}  // namespace structkv::cli
