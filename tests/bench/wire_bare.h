// What Compress is measured against: a gRPC service that only moves bytes, written with the same
// callback API over the same raw byte buffers.
#pragma once

#include <memory>
#include <string>

namespace structkv::bench {

// Sends every message back as it came, reading on while up to a few wait to be written.
inline constexpr char kEchoMethod[] = "/structkv.bench.Bare/Echo";
// Answers every message with `kAnswerBytesKey` (request metadata) bytes.
inline constexpr char kAnswerMethod[] = "/structkv.bench.Bare/Answer";
inline constexpr char kAnswerBytesKey[] = "answer-bytes";
// Request metadata of both: before each answer the arithmetic of a layer of that many tokens is
// done (wire_arithmetic.h); 0: none.
inline constexpr char kArithmeticTokensKey[] = "arithmetic-tokens";

// Makes glibc's malloc keep freed pages, as structkv-server does. Call first in main.
void KeepFreedMemory();

// Serves the two methods on `addresses` (gRPC names, separated by commas) until the process is
// killed; prints "ready" and the addresses, with the ports that it got for those of 0, when it
// listens. Returns an exit code only where that fails.
int ServeBare(const std::string& addresses);

}  // namespace structkv::bench
