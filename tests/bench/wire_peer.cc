#include "tests/bench/wire_peer.h"

#include <cstdio>
#include <cstdlib>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/impl/codegen/rpc_method.h"
#include "grpcpp/security/credentials.h"

namespace structkv::bench {

std::vector<std::pair<std::string, int>> ChannelSettings() {
  std::vector<std::pair<std::string, int>> settings;
  const char* text = std::getenv(kChannelSettings);  // NOLINT(concurrency-mt-unsafe)
  for (absl::string_view one :
       absl::StrSplit(text == nullptr ? "" : text, ',', absl::SkipEmpty())) {
    const std::vector<std::string> parts = absl::StrSplit(one, '=');
    int value = 0;
    if (parts.size() != 2 || !absl::SimpleAtoi(parts[1], &value)) {
      Die("--channel " + std::string(one) + ": NAME=INTEGER is expected");
    }
    settings.emplace_back(parts[0], value);
  }
  return settings;
}

std::shared_ptr<grpc::Channel> Connect(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  for (const auto& [name, value] : ChannelSettings()) arguments.SetInt(name, value);
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
