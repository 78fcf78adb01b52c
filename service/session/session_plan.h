// What a session takes: the memory that it reserves, and how long its layers compute.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "service/engine/prompt_spec.h"
#include "service/session/session.h"

namespace structkv::session {

// How long a prompt's layers compute.
enum class LayerSize {
  kSmall,   // well under a millisecond on one core
  kMedium,  // about a millisecond on two
  kLarge,
};

struct SessionPlan {
  int64_t reserved_bytes = 0;      // the session's memory at most, all of the following included
  int64_t layer_output_bytes = 0;  // one layer's result
  // Unsent results: two layers and the pivot; with PromptSpec::pull a third layer, whose positions
  // are being found while others are answered.
  int64_t output_limit_bytes = 0;
  LayerSize layer_size = LayerSize::kLarge;
};

LayerSize SizeOfLayers(const engine::PromptSpec& spec, const Backend& backend);

// `request.spec` was validated, and so was its shard, of whose group every rank reserves an even
// share of what is not one rank's alone. Keys and values that `transport` has in place, and rows
// that it has room for, take nothing of it. INVALID_ARGUMENT where `layers_in_flight`,
// `idempotency_key` or `max_message_bytes` is out of range, or the sum of bytes does not fit 63
// bits. RESOURCE_EXHAUSTED, with the payload kNeverFits, where the prompt never has the device
// memory that its layers take.
absl::StatusOr<SessionPlan> PlanSession(
    const SessionRequest& request, const Backend& backend,
    const transport::Transport& transport = *transport::InlineTransport());

// The prompt's own tensors: with the rank's heads alone where it is one.
engine::PromptSpec OwnSpec(const SessionRequest& request);

}  // namespace structkv::session
