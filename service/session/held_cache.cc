#include "service/session/held_cache.h"

#include <limits>
#include <utility>

#include "absl/numeric/int128.h"
#include "absl/status/status.h"
#include "service/session/session.h"

namespace structkv::session {
namespace {

int64_t Pages(int64_t bytes) {
  constexpr int64_t kPage = 4096;
  return (bytes + kPage - 1) / kPage * kPage;
}

}  // namespace

engine::LayerOutput HoldRows(engine::LayerOutput output, HeldCache* cache) {
  engine::LayerOutput rest;
  rest.layer = output.layer;
  rest.kept_tokens = output.kept_tokens;
  rest.kept_blocks = output.kept_blocks;
  rest.metrics = output.metrics;
  rest.positions = output.positions;
  rest.saliency = std::move(output.saliency);
  cache->size_bytes += OutputBytes(output);
  for (engine::Buffer* buffer :
       {&output.keys, &output.values, &output.key_scales, &output.value_scales}) {
    buffer->Trim();
  }
  const auto layer = static_cast<size_t>(output.layer);
  cache->layers[layer] = std::move(output);
  return rest;
}

absl::StatusOr<int64_t> HeldBytes(const engine::PromptSpec& own) {
  const engine::ModelGeometry& geometry = own.geometry;
  const auto element = static_cast<int64_t>(DTypeSize(own.dtype));
  const int64_t sets = own.per_kv_head() ? geometry.kv_heads : 1;
  const int64_t scales = Pages(own.scale_count() * static_cast<int64_t>(sizeof(float)));
  absl::int128 total = 0;
  for (int64_t layer = 0; layer < geometry.layers; ++layer) {
    const int64_t kept = own.kept_tokens(layer);
    const int64_t rows = geometry.kv_heads * own.kv_slots(kept);
    total += Pages(sets * kept * static_cast<int64_t>(sizeof(int32_t)));
    total += Pages(rows * geometry.key_dim * element) + scales;
    if (geometry.values_in_keys) continue;
    total += Pages(rows * geometry.value_dim * element) + scales;
  }
  if (total > std::numeric_limits<int64_t>::max()) {
    return absl::InvalidArgumentError("the held cache needs more memory than can be counted");
  }
  return static_cast<int64_t>(total);
}

}  // namespace structkv::session
