// A whole prompt, or a batch of them, in one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "structkv/client.h"
#include "structkv/options.h"
#include "structkv/result.h"
#include "structkv/session.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::client {

// Gives a layer's tensors, asked for in ascending order, for the layers that keep tokens. Where an
// attempt fails before its first result, the next one asks from layer 0 again.
using LayerSource = absl::FunctionRef<absl::StatusOr<LayerTensors>(uint32_t layer)>;

// Compresses a prompt and collects its results. Fails with the source's status where that fails.
absl::StatusOr<Compressed> CompressPrompt(Client& client, const v1::Open& open, LayerSource source,
                                          const SessionOptions& options = {});

// The same, with the results handed to `options.on_event` as they arrive; returns the summary.
// INVALID_ARGUMENT where `on_event` is not set.
absl::StatusOr<v1::Summary> StreamPrompt(Client& client, const v1::Open& open, LayerSource source,
                                         const SessionOptions& options);

// Gives the tensors of a layer of prompt number `prompt` of a batch; otherwise as LayerSource.
using BatchSource = absl::FunctionRef<absl::StatusOr<LayerTensors>(size_t prompt, uint32_t layer)>;

// Compresses the prompts of a batch in one stream, with each one's results handed to its `on_event`
// as they arrive: asks for a layer of each prompt in turn, as an engine has them that prefills them
// together. Returns each one's summary, or why it failed, in the order of `prompts`; where the
// source fails, that prompt does. Prompts that found no room beside the others, or whose server
// went away before their first result, are tried again once the others are over.
std::vector<absl::StatusOr<v1::Summary>> StreamBatch(Client& client,
                                                     absl::Span<const BatchPrompt> prompts,
                                                     BatchSource source,
                                                     const StreamOptions& options = {});

// Gives a layer's tensors once the layers before it were answered; asked for the layers that keep
// tokens. `pivot` is null until they have decided it; from pivot->skeleton_from_layer on the layer
// may hold skeleton rows (LayerTensors.positions).
using SteppedSource =
    absl::FunctionRef<absl::StatusOr<LayerTensors>(uint32_t layer, const PivotResult* pivot)>;

// As StreamPrompt, one layer after the other: each is answered before the next one is asked for, so
// that a worker which computes layer by layer can cut its work at the pivot. Events are handed on
// by the calling thread.
absl::StatusOr<v1::Summary> StreamPromptInSteps(Client& client, const v1::Open& open,
                                                SteppedSource source,
                                                const SessionOptions& options);

}  // namespace structkv::client
