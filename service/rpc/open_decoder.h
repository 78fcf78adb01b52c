// The public API's `Open` and the engine's prompt specification, each from the other. Pure
// functions: the server's edge and the command line's in-process mode share them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "service/engine/prompt.h"
#include "service/engine/prompt_spec.h"
#include "service/engine/shard.h"
#include "service/transport/negotiation.h"
#include "structkv/v1/compression.pb.h"
#include "structkv/v1/held_cache.pb.h"

namespace structkv::rpc {

inline constexpr int64_t kMinMessageBytes = int64_t{64} << 10;
inline constexpr int64_t kDefaultMessageBytes = int64_t{4} << 20;
inline constexpr size_t kMaxIdempotencyKeyBytes = 128;
inline constexpr size_t kMaxModelIdBytes = 256;

// A decoded `Open`, with every default filled in.
struct OpenRequest {
  engine::PromptSpec spec;
  int64_t layers_in_flight = 2;
  std::string idempotency_key;
  // The rank that the stream is, where it is one of a group; for engine::ValidateShard.
  std::optional<engine::ShardMember> shard;
  // The compacted cache stays in the server, with a lease of `lease_millis` or the default.
  bool hold = false;
  std::optional<uint64_t> lease_millis;
  // Where tensors are to lie; without the tenant, which the message does not have.
  transport::TransportRequest transport;
  // Longest message that the caller accepts, in bytes.
  int64_t max_response_message_bytes = kDefaultMessageBytes;
};

// Defaults are those of the proto's comments. INVALID_ARGUMENT, naming the field as the proto does,
// the value and what is allowed, for an unknown or missing enum value, a field that contradicts
// another, and what only the wire limits (lengths of texts and messages, layers in flight). Ranges
// of the spec itself are for engine::ValidateSpec, which every prompt must pass before its sizes
// are used. `max_message_bytes` is the server's own limit, at least kMinMessageBytes.
absl::StatusOr<OpenRequest> DecodeOpen(const v1::Open& open, int64_t max_message_bytes);

// Where a fetch's keys and values are to go; likewise, and errors name the fields of the request.
absl::StatusOr<transport::TransportRequest> DecodeTransports(const v1::FetchCacheRequest& fetch);

// The method with every parameter in force.
v1::Method EncodeMethod(const method::MethodSpec& spec);

// What of `Opened` follows from a valid spec: method, kept_tokens, skeleton_tokens,
// required_tensors, window_tokens, statistic, fingerprint and rotary.
v1::Opened EncodeOpened(const engine::PromptSpec& spec);

// `LayerResult.metrics`, without a transition score.
v1::LayerMetrics EncodeMetrics(int64_t layer, const method::LayerMetrics& metrics);

// Everything of `PivotDecision` but its pieces and `complete`.
v1::PivotDecision EncodePivot(const method::PivotDecision& decision);

v1::DType EncodeDType(DType dtype);
v1::KvScales EncodeKvScales(engine::KvScales scales);
v1::Statistic EncodeStatistic(engine::Statistic statistic);
v1::Transport EncodeTransport(transport::Kind kind);
v1::Tensor EncodeTensor(engine::InputTensor tensor);
// nullopt for a tensor that no client sends, or an unknown number.
std::optional<engine::InputTensor> DecodeTensor(int tensor);

}  // namespace structkv::rpc
