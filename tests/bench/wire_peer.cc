#include "tests/bench/wire_peer.h"

#include <cstdio>
#include <cstdlib>

#include "grpcpp/create_channel.h"
#include "grpcpp/impl/codegen/rpc_method.h"
#include "grpcpp/security/credentials.h"

namespace structkv::bench {

std::shared_ptr<grpc::Channel> Connect(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

std::unique_ptr<RawStream> StartStream(const std::shared_ptr<grpc::Channel>& channel,
                                       const char* method, grpc::ClientContext* context) {
  const grpc::internal::RpcMethod rpc(method, grpc::internal::RpcMethod::BIDI_STREAMING, channel);
  return std::unique_ptr<RawStream>(
      grpc::internal::ClientReaderWriterFactory<grpc::ByteBuffer, grpc::ByteBuffer>::Create(
          channel.get(), rpc, context));
}

void FinishOrDie(RawStream* stream, const char* what) {
  const grpc::Status status = stream->Finish();
  if (!status.ok()) {
    Die(std::string(what) + ": code " + std::to_string(status.error_code()) + ": " +
        status.error_message());
  }
}

void Die(const std::string& what) {
  std::fprintf(stderr, "structkv_wire_bench: %s\n", what.c_str());
  std::exit(1);
}

}  // namespace structkv::bench
