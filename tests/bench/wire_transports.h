// What a layer of keys and values costs over each transport, beside the least that it could.
#pragma once

#include <cstdint>
#include <string>

#include "nlohmann/json.hpp"

namespace structkv::bench {

inline constexpr double kSharedMemoryBarMicros = 100;  // of a layer, above the arithmetic

struct TransportAddresses {
  std::string bare_tcp, bare_unix;
  std::string tcp, unix_socket;
  int64_t server_pid = 0;
};

// Llama-3.1-8B's layers of `tokens` tokens in bf16 with window queries, StructKV at 10 %: in
// messages over TCP and over a unix socket, and in shared memory. `prompts` prompts of each, in
// turns, one layer after the other, are the latencies; as many, sent at once, the rates. The floor
// of shared memory is the same engine on the same tensors in this process; that of messages is
// besides a bare stream of as many bytes there and back. One entry for each transport.
nlohmann::json MeasureTransports(const TransportAddresses& addresses, uint32_t tokens, int prompts);
void PrintTransports(const nlohmann::json& rows);
// Whether shared memory meets its bar.
bool TransportsPass(const nlohmann::json& rows);

}  // namespace structkv::bench
