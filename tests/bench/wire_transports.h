// What a layer of keys and values costs over each transport, beside the least that it could.
#pragma once

#include <cstdint>
#include <string>

#include "nlohmann/json.hpp"
#include "tests/bench/wire_gpu.h"

namespace structkv::bench {

inline constexpr double kSharedMemoryBarMicros = 100;  // of a layer, above the arithmetic

struct TransportAddresses {
  std::string bare_tcp, bare_unix;
  std::string tcp, unix_socket;
  int64_t server_pid = 0;
};

struct TransportOptions {
  int prompts = 0;  // of each transport, and as many again
  uint32_t tokens = 16384;
  std::string geometry = "llama-3.1-8b";
  std::string backend = "auto";  // in this process
  GpuOptions gpu;
};

// A model's layers in bf16 with window queries, StructKV at 10 %: in messages over TCP and over a
// unix socket, in shared memory, and, where there are GPUs, by CUDA IPC and NCCL. `prompts` prompts
// of each, in turns, one layer after the other, are the latencies; as many, sent at once, the
// rates. One entry for each transport, with its floor:
//   shared memory  the same engine on the same tensors in this process
//   messages       besides, a bare stream of as many bytes there and back
//   CUDA IPC       a copy of the keys and values from one place of the GPU's memory to another
//   NCCL           they, and the rows that stay, by bare NCCL there and back
// One that cannot be run here has a reason, "skipped", in the place of figures.
nlohmann::json MeasureTransports(const TransportAddresses& addresses,
                                 const TransportOptions& options);
void PrintTransports(const nlohmann::json& rows);
// Whether shared memory meets its bar.
bool TransportsPass(const nlohmann::json& rows);

}  // namespace structkv::bench
