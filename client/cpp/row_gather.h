// Takes the rows that a pull asks for out of a layer's whole tensors.
#pragma once

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "structkv/bytes.h"
#include "structkv/options.h"
#include "structkv/result.h"
#include "structkv/session.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::client::internal {

using RowAllocator = absl::FunctionRef<absl::StatusOr<Bytes>(size_t size)>;

// The rows of `pull` out of `tensors`, which hold all of the prompt's tokens or, where `positions`
// is not empty, those (ascending). Each tensor that is pulled is copied once, to memory that
// `allocate` gives; where every row stays it is handed on as it is, with its owner. Fails as
// `allocate` does.
//   INVALID_ARGUMENT  a tensor of the wrong size
//   DATA_LOSS         a position that the layer does not hold
absl::StatusOr<PulledRows> GatherPulledRows(const v1::Open& open, const LayerTensors& tensors,
                                            absl::Span<const int32_t> positions,
                                            const RowPull& pull, RowAllocator allocate);

// Bytes of `rows` tokens of every KV head that the stream carries, whatever becomes of the answer.
uint64_t RowsBytes(const v1::Open& open, v1::Tensor tensor, uint64_t rows);

// INVALID_ARGUMENT where `tensors`, of `tokens` tokens, do not have what `open.pull` may ask for.
absl::Status CheckPullable(const v1::Open& open, uint32_t layer, const LayerTensors& tensors,
                           size_t tokens);

}  // namespace structkv::client::internal
