#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "grpc/grpc.h"
#include "service/rpc/connection_listener.h"
#include "service/server.h"
#include "service/server_limits.h"

namespace structkv {
namespace {

constexpr int kMaxMetadataBytes = 16 << 10;
// Pings that come too early, before the connection is closed.
constexpr int kMaxPingStrikes = 2;

int Millis(absl::Duration duration) {
  return static_cast<int>(
      std::min<int64_t>(absl::ToInt64Milliseconds(duration), std::numeric_limits<int>::max()));
}

}  // namespace

int64_t MaxStreamsPerPeer(const ServerOptions& options) {
  if (options.max_streams_per_peer > 0) return options.max_streams_per_peer;
  return int64_t{2} * options.max_streams_per_connection;
}

absl::Status CheckOptions(const ServerOptions& options) {
  if (options.streams.max_message_bytes < rpc::kMinMessageBytes) {
    return absl::InvalidArgumentError(absl::StrCat("max_message_bytes is ",
                                                   options.streams.max_message_bytes, "; at least ",
                                                   rpc::kMinMessageBytes));
  }
  if (MaxStreamsPerPeer(options) < options.max_streams_per_connection) {
    return absl::InvalidArgumentError(absl::StrCat(
        "max-streams-per-peer is ", options.max_streams_per_peer,
        "; at least max-streams-per-connection (", options.max_streams_per_connection, "), or 0"));
  }
  for (const auto& [name, limit] : {std::pair("stall limit", options.streams.stall),
                                    std::pair("silence limit", options.streams.silence),
                                    std::pair("session limit", options.streams.session),
                                    std::pair("shard group limit", options.streams.shard_group)}) {
    if (limit <= absl::ZeroDuration()) {
      return absl::InvalidArgumentError(
          absl::StrCat("the ", name, " is ", absl::FormatDuration(limit), "; it must be above 0"));
    }
  }
  const session::HoldOptions& hold = options.sessions.hold;
  if (hold.default_lease < absl::Milliseconds(1) || hold.default_lease > hold.max_lease) {
    return absl::InvalidArgumentError(absl::StrCat(
        "hold-lease is ", absl::FormatDuration(hold.default_lease), "; 1ms to max-hold-lease (",
        absl::FormatDuration(hold.max_lease), ") are allowed"));
  }
  const transport::RegionOptions& regions = options.regions.regions;
  if (regions.lease < transport::kMinLease || regions.max_lease < regions.lease) {
    return absl::InvalidArgumentError(
        absl::StrCat("region-lease is ", absl::FormatDuration(regions.lease), "; ",
                     absl::FormatDuration(transport::kMinLease), " to region-lease-limit (",
                     absl::FormatDuration(regions.max_lease), ") are allowed"));
  }
  if (absl::Status status = rpc::CheckTls(options.tls); !status.ok()) return status;
  if (!options.identity.certificate_names.empty() && options.tls.client_authorities.empty()) {
    return absl::InvalidArgumentError(
        "client-names needs client-authorities: no certificate is asked for without them");
  }
  if (!options.identity.proxy_names.empty() && options.tls.client_authorities.empty()) {
    return absl::InvalidArgumentError(
        "proxy-names needs client-authorities: no certificate is asked for without them");
  }
  for (const std::string& address : options.listen) {
    if (absl::Status status = rpc::CheckListenAddress(address); !status.ok()) return status;
    if (options.tls.enabled() || options.insecure || rpc::IsLocalAddress(address)) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("listen is ", address,
                     ", which other hosts reach, and there is no TLS (tls-certificate, tls-key); "
                     "insecure allows it"));
  }
  if (options.nccl.library.empty() && options.nccl.memory_bytes > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("nccl-memory is ", options.nccl.memory_bytes,
                     " bytes, and there is no nccl-library that would use them"));
  }
  return absl::OkStatus();
}

void SetLimits(const ServerOptions& options, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(static_cast<int>(options.streams.max_message_bytes));
  builder->SetMaxSendMessageSize(-1);
  // Identity alone: a compressed message is refused before it can grow.
  builder->AddChannelArgument(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1);
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_streams_per_connection);
  builder->AddChannelArgument(GRPC_ARG_ENABLE_CHANNELZ, 1);  // rpc/open_streams.h asks it
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  builder->AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS,
                              Millis(options.handshake_limit));
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, Millis(options.keepalive_interval));
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, Millis(options.keepalive_timeout));
  if (options.connection_age > absl::ZeroDuration()) {
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, Millis(options.connection_age));
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS,
                                Millis(options.streams.session));
  }
  if (options.connection_idle > absl::ZeroDuration()) {
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, Millis(options.connection_idle));
  }
  // Clients may ask too, but not more often than this.
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, kMaxPingStrikes);
  // Reflection alone uses the synchronous API's threads.
  builder->SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::NUM_CQS, 1);
  builder->SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::MIN_POLLERS, 1);
  builder->SetSyncServerOption(grpc::ServerBuilder::SyncServerOption::MAX_POLLERS, 2);
}

}  // namespace structkv
