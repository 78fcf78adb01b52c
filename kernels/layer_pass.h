// A layer in one call, for backends that the host is far from: what one step makes for the next
// stays where it is computed.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/resident_vectors.h"

namespace structkv {

// From window queries and keys to the rows that stay: Saliency, SumHeads, Sums, Pool, Select, and
// Gather at the positions that were selected, with the results that these have one after the other
// (Backend::RunLayer).
struct LayerPass {
  SaliencyParams saliency;  // as Saliency takes it
  int64_t top_count = 0;    // as Sums takes it, of the sum over the heads

  // Selected by the sum over the heads or, `per_head`, for each KV head by its own saliency. The
  // tokens before the window are smoothed before.
  bool per_head = false;
  Pooling pooling = Pooling::kNone;
  int64_t pooling_kernel = 1;
  int64_t window = 0;  // as SelectParams
  int64_t keep = 0;

  // As Gather takes them. `first_head`: the saliency's head that the source's first one is.
  struct Rows {
    TensorView source;
    MutableTensorView destination;
    int64_t first_head = 0;
  };
  std::vector<Rows> rows;

  // What Stage of the same backend has begun for `saliency`; good for one call. Null: nothing.
  StagedLayer* staged = nullptr;

  // Where the sum over the heads goes besides, as ResidentVectors::Add would put it there: vectors
  // of the same backend, on a GPU. Null: nowhere.
  ResidentVectors* resident = nullptr;
  ResidentPlace resident_to;

  // Outputs, in the host's memory.
  float* heads = nullptr;        // [kv_heads, tokens]; null: not wanted
  float* sum = nullptr;          // [tokens]; null: not wanted
  int32_t* positions = nullptr;  // [keep] or, `per_head`, [kv_heads, keep]; not null
  SaliencySums* sums = nullptr;  // not null
};

}  // namespace structkv
