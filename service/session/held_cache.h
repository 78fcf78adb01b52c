// A compacted cache that stays in the service.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "service/engine/buffer_pool.h"
#include "service/engine/prompt.h"
#include "service/engine/prompt_spec.h"
#include "service/engine/shard.h"
#include "service/session/memory_budget.h"

namespace structkv::session {

// Filled by one session, and not changed once it is published.
struct HeldCache {
  engine::PromptSpec spec;     // the whole prompt's
  engine::HeadRange kv_heads;  // of the model, that are held
  // Of the held layers' memory; both go after it.
  Reservation reservation;
  engine::BufferAllowance allowance;
  // By layer: positions, keys, values and scales of `kv_heads`, without saliency.
  std::vector<engine::LayerOutput> layers;
  int64_t size_bytes = 0;  // of the layers' tensors
};

// Keeps a layer's rows, and returns the rest: its positions, metrics and saliency.
engine::LayerOutput HoldRows(engine::LayerOutput output, HeldCache* cache);

// Memory that a cache of `own` (with the held heads alone) takes at most, in whole pages.
// INVALID_ARGUMENT where it does not fit 63 bits.
absl::StatusOr<int64_t> HeldBytes(const engine::PromptSpec& own);

}  // namespace structkv::session
