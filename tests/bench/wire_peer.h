// The client's side of a raw byte stream, the same for the bare service and for Compress.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/sync_stream.h"

namespace structkv::bench {

inline constexpr char kCompressMethod[] = "/structkv.v1.Compression/Compress";

using RawStream = grpc::ClientReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>;

// gRPC's channel arguments that Connect() and the bare server set beside their own, by name: those
// of the variable below, "grpc.http2.max_frame_size=1048576,...".
inline constexpr char kChannelSettings[] = "STRUCTKV_BENCH_CHANNEL";
std::vector<std::pair<std::string, int>> ChannelSettings();

// A channel of its own connection, for messages of any size.
std::shared_ptr<grpc::Channel> Connect(const std::string& address);
// A stream of raw messages; `context` and the channel outlive it.
std::unique_ptr<RawStream> StartStream(const std::shared_ptr<grpc::Channel>& channel,
                                       const char* method, grpc::ClientContext* context);
// Ends the program with `what` and the stream's status where that is not OK.
void FinishOrDie(RawStream* stream, const char* what);
[[noreturn]] void Die(const std::string& what);

}  // namespace structkv::bench
