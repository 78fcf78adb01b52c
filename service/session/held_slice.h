// Some layers and KV heads of a held cache, as one sequence of tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "service/engine/prompt_spec.h"
#include "service/engine/shard.h"
#include "service/session/held_cache.h"
#include "service/transport/negotiation.h"

namespace structkv::session {

// What is asked for; as in the proto's FetchCacheRequest.
struct SliceRequest {
  uint32_t first_layer = 0;
  uint32_t layer_count = 0;    // 0: from first_layer on
  uint32_t first_kv_head = 0;  // of the model
  uint32_t kv_head_count = 0;  // 0: from first_kv_head on
};

// A tensor as runs of equal length at equal distances.
struct SlicedTensor {
  engine::InputTensor tensor = engine::InputTensor::kKeys;
  const std::byte* data = nullptr;  // host; the first run
  int64_t runs = 0;
  int64_t run_bytes = 0;
  int64_t stride_bytes = 0;  // from run to run

  int64_t size() const { return runs * run_bytes; }
  bool contiguous() const { return runs <= 1 || run_bytes == stride_bytes; }
};

// Copies the tensor's bytes from `offset` on; there are `out.size()` more.
void CopyOut(const SlicedTensor& tensor, int64_t offset, absl::Span<std::byte> out);

class HeldSlice {
 public:
  // INVALID_ARGUMENT, naming the fields, what came and what is held.
  static absl::StatusOr<HeldSlice> Make(std::shared_ptr<const HeldCache> cache,
                                        const SliceRequest& request);

  const std::shared_ptr<const HeldCache>& cache() const { return cache_; }
  int64_t first_layer() const { return first_layer_; }
  int64_t end_layer() const { return end_layer_; }
  const engine::HeadRange& kv_heads() const { return kv_heads_; }

  // Those of a layer that are not empty: positions, keys, values, scales of keys and of values.
  std::vector<SlicedTensor> Tensors(int64_t layer) const;
  int64_t LayerBytes(int64_t layer) const;
  // Of the keys and values that are asked for.
  transport::PromptSizes result_sizes() const;
  int64_t total_bytes() const { return total_bytes_; }
  // Whether there is a tensor that is not contiguous.
  bool strided() const { return strided_; }

 private:
  HeldSlice() = default;

  std::shared_ptr<const HeldCache> cache_;
  int64_t first_layer_ = 0;
  int64_t end_layer_ = 0;
  engine::HeadRange kv_heads_;
  int64_t total_bytes_ = 0;
  bool strided_ = false;
};

}  // namespace structkv::session
