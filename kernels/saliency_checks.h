// What every backend says about bad saliency inputs, so that the texts are the same everywhere.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/backend.h"

namespace structkv {

// INVALID_ARGUMENT, naming the field, the value and the limit, where shapes, types or the scale are
// out of range or do not fit together. Looks at no tensor element.
absl::Status CheckSaliencyParams(const SaliencyParams& params,
                                 const BackendCapabilities& capabilities);

// The factor of the scores in force: `params.scale`, or 1 / sqrt(key_dim) where that is 0.
double SaliencyScale(const SaliencyParams& params);

// SaliencyScale times what a unit of `head`'s keys stands for.
double SaliencyScale(const SaliencyParams& params, int64_t head);

// A query row holds `value`, which is not finite. Fills `bad`, if not null, with the KV head and
// the token of that row.
absl::Status BadQueryError(const SaliencyParams& params, int64_t query_head, int64_t row,
                           float value, BadStatistic* bad);

// The row's log-sum-exp is not finite. Fills `bad` likewise.
absl::Status BadLseError(const SaliencyParams& params, int64_t query_head, int64_t row, float value,
                         BadStatistic* bad);

// A score (or, where the caller's log-sum-exp is far too low, an attention weight) is not finite.
absl::Status BadScoreError(const BadStatistic& found, BadStatistic* bad);

}  // namespace structkv
