#include "service/session/session_plan.h"

#include <algorithm>
#include <limits>

#include "absl/numeric/int128.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "service/session/layer_assembler.h"
#include "service/session/limit.h"
#include "service/session/memory_budget.h"

namespace structkv::session {
namespace {

constexpr size_t kMaxKeyBytes = 128;
// Layers whose results may wait to be sent; one is on its way while the next one is computed.
constexpr int64_t kUnsentLayers = 2;
// With rows that are pulled, an answer may become complete while another one is computed.
constexpr int64_t kUnsentLayersWithPull = 3;

int64_t PivotBytes(const engine::PromptSpec& spec) {
  int64_t bytes = spec.skeleton_tokens() * static_cast<int64_t>(sizeof(int32_t));
  if (spec.return_centrality) bytes += spec.prompt_tokens * static_cast<int64_t>(sizeof(float));
  return bytes;
}

}  // namespace

// A rough estimate from low rates of one core: 20 multiply-adds a nanosecond, 5 bytes a nanosecond.
// Two cores take less than a tenth of it for layers of some milliseconds.
LayerSize SizeOfLayers(const engine::PromptSpec& spec, const Backend& backend) {
  const engine::MemoryPlan memory = engine::PlanMemory(spec, backend);
  constexpr double kSmallNanos = 300e3;
  constexpr double kMediumNanos = 15e6;
  const double dots = static_cast<double>(spec.geometry.query_heads) *
                      static_cast<double>(spec.window_rows()) *
                      static_cast<double>(spec.prompt_tokens);
  const double multiplies = spec.statistic == engine::Statistic::kWindowQueries
                                ? dots * static_cast<double>(spec.geometry.key_dim)
                                : 0.0;
  const auto bytes = static_cast<double>(memory.layer_input_bytes + memory.layer_output_bytes);
  const double nanos = multiplies / 20 + bytes / 5;
  if (nanos < kSmallNanos) return LayerSize::kSmall;
  return nanos < kMediumNanos ? LayerSize::kMedium : LayerSize::kLarge;
}

engine::PromptSpec OwnSpec(const SessionRequest& request) {
  return request.shard.has_value() ? engine::ShardSpec(request.spec, request.shard->heads)
                                   : request.spec;
}

absl::StatusOr<SessionPlan> PlanSession(const SessionRequest& request, const Backend& backend,
                                        const transport::Transport& transport) {
  const engine::PromptSpec& spec = request.spec;
  if (request.layers_in_flight < 1 || request.layers_in_flight > spec.geometry.layers) {
    return absl::InvalidArgumentError(absl::StrCat("layers_in_flight is ", request.layers_in_flight,
                                                   "; 1 to layer_count (", spec.geometry.layers,
                                                   ") is allowed"));
  }
  if (request.idempotency_key.size() > kMaxKeyBytes) {
    return absl::InvalidArgumentError(absl::StrCat("idempotency_key has ",
                                                   request.idempotency_key.size(), " bytes; ",
                                                   kMaxKeyBytes, " are allowed"));
  }
  if (request.max_message_bytes < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_message_bytes is ", request.max_message_bytes, "; 0 or more is allowed"));
  }
  if (absl::Status room = engine::CheckRoom(spec, backend, !transport.host_readable());
      !room.ok()) {
    room.SetPayload(kNeverFits, absl::Cord());
    return MarkLimit(room, kDeviceMemoryLimit);
  }
  // A rank's own tensors, and its share of what the group has in common.
  const engine::PromptSpec own = OwnSpec(request);
  engine::MemoryPlan memory = engine::PlanMemory(own, backend);
  if (transport.in_place()) memory.layer_input_bytes -= memory.layer_kv_bytes;
  if (transport.gives_room()) {
    memory.layer_output_bytes -= memory.layer_rows_bytes;
  }
  int64_t common = memory.state_bytes + memory.scratch_bytes;
  if (request.shard.has_value()) {
    const int64_t ranks = request.shard->shard_count;
    common = (engine::SharedBytes(spec, backend) + ranks - 1) / ranks;
  }
  SessionPlan plan;
  plan.layer_output_bytes = memory.layer_output_bytes;
  const bool pulls = spec.pull != engine::Pull::kNone;
  plan.output_limit_bytes =
      (pulls ? kUnsentLayersWithPull : kUnsentLayers) * memory.layer_output_bytes +
      PivotBytes(spec);
  plan.layer_size = SizeOfLayers(spec, backend);
  // A layer that waits for its rows holds them and the rest of its answer in place of its input.
  const int64_t layer_bytes = pulls ? std::max(memory.layer_input_bytes, memory.layer_output_bytes)
                                    : memory.layer_input_bytes;
  const absl::int128 total = absl::int128(request.layers_in_flight) * layer_bytes +
                             plan.output_limit_bytes + common + request.max_message_bytes +
                             LayerAssembler::RecordBytes(own);
  if (total > std::numeric_limits<int64_t>::max()) {
    return absl::InvalidArgumentError("the prompt needs more memory than can be counted");
  }
  plan.reserved_bytes = static_cast<int64_t>(total);
  return plan;
}

}  // namespace structkv::session
