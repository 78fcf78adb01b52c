#include "service/session/held_slice.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace structkv::session {
namespace {

// first .. first + count - 1 (count 0: all from `first` on), within begin .. end - 1.
absl::StatusOr<engine::HeadRange> Range(const char* first_name, uint32_t first,
                                        const char* count_name, uint32_t count, int64_t begin,
                                        int64_t end, const char* what) {
  const int64_t from = first == 0 && count == 0 ? begin : first;
  const int64_t to = count == 0 ? end : int64_t{first} + count;
  if (from < begin || to > end || from >= to) {
    return absl::InvalidArgumentError(absl::StrCat(first_name, " is ", first, " and ", count_name,
                                                   " ", count, "; ", what, " ", begin, " to ",
                                                   end - 1, " are held"));
  }
  return engine::HeadRange{from, to - from};
}

}  // namespace

void CopyOut(const SlicedTensor& tensor, int64_t offset, absl::Span<std::byte> out) {
  const std::byte* run = tensor.data + offset / tensor.run_bytes * tensor.stride_bytes;
  auto at = static_cast<size_t>(offset % tensor.run_bytes);
  const auto run_bytes = static_cast<size_t>(tensor.run_bytes);
  while (!out.empty()) {
    const size_t take = std::min(run_bytes - at, out.size());
    std::memcpy(out.data(), run + at, take);
    out.remove_prefix(take);
    run += tensor.stride_bytes;
    at = 0;
  }
}

absl::StatusOr<HeldSlice> HeldSlice::Make(std::shared_ptr<const HeldCache> cache,
                                          const SliceRequest& request) {
  const absl::StatusOr<engine::HeadRange> layers =
      Range("first_layer", request.first_layer, "layer_count", request.layer_count, 0,
            cache->spec.geometry.layers, "layers");
  if (!layers.ok()) return layers.status();
  const absl::StatusOr<engine::HeadRange> heads =
      Range("first_kv_head", request.first_kv_head, "kv_head_count", request.kv_head_count,
            cache->kv_heads.begin, cache->kv_heads.end(), "KV heads");
  if (!heads.ok()) return heads.status();
  HeldSlice slice;
  slice.cache_ = std::move(cache);
  slice.first_layer_ = layers->begin;
  slice.end_layer_ = layers->end();
  slice.kv_heads_ = *heads;
  for (int64_t layer = slice.first_layer_; layer < slice.end_layer_; ++layer) {
    for (const SlicedTensor& tensor : slice.Tensors(layer)) {
      slice.total_bytes_ += tensor.size();
      slice.strided_ |= !tensor.contiguous();
    }
  }
  return slice;
}

std::vector<SlicedTensor> HeldSlice::Tensors(int64_t layer) const {
  const engine::LayerOutput& output = cache_->layers[static_cast<size_t>(layer)];
  const engine::PromptSpec& spec = cache_->spec;
  const bool heads_first = spec.layout == Layout::kHeadTokenDim;
  const int64_t rows = spec.kv_slots(output.kept_tokens);  // of each head
  // [outer, kv_head, inner]
  const int64_t blocks = spec.paged.has_value() ? output.kept_blocks : 1;
  const int64_t outer = heads_first ? blocks : rows;

  std::vector<SlicedTensor> tensors;
  const auto add = [&](engine::InputTensor tensor, const void* data, size_t size,
                       int64_t outer_count, bool by_head) {
    if (size == 0) return;
    const auto bytes = static_cast<int64_t>(size);
    SlicedTensor sliced = {tensor, static_cast<const std::byte*>(data), 1, bytes, bytes};
    if (by_head) {
      const int64_t inner = bytes / (outer_count * cache_->kv_heads.count);
      sliced.data += (kv_heads_.begin - cache_->kv_heads.begin) * inner;
      sliced.runs = outer_count;
      sliced.run_bytes = kv_heads_.count * inner;
      sliced.stride_bytes = cache_->kv_heads.count * inner;
    }
    tensors.push_back(sliced);
  };
  const auto add_buffer = [&](engine::InputTensor tensor, const engine::Buffer& buffer,
                              int64_t outer_count, bool by_head) {
    add(tensor, buffer.data(), buffer.size(), outer_count, by_head);
  };
  const bool scales_by_head = spec.kv_scales == engine::KvScales::kPerKvHead;
  add(engine::InputTensor::kPositions, output.positions.data(),
      output.positions.size() * sizeof(int32_t), 1, spec.per_kv_head());
  add_buffer(engine::InputTensor::kKeys, output.keys, outer, true);
  add_buffer(engine::InputTensor::kValues, output.values, outer, true);
  add_buffer(engine::InputTensor::kKeyScales, output.key_scales, 1, scales_by_head);
  add_buffer(engine::InputTensor::kValueScales, output.value_scales, 1, scales_by_head);
  return tensors;
}

transport::PromptSizes HeldSlice::result_sizes() const {
  transport::PromptSizes sizes{.layers = end_layer_ - first_layer_};
  for (int64_t layer = first_layer_; layer < end_layer_; ++layer) {
    for (const SlicedTensor& tensor : Tensors(layer)) {
      int64_t* largest = tensor.tensor == engine::InputTensor::kKeys     ? &sizes.key_bytes
                         : tensor.tensor == engine::InputTensor::kValues ? &sizes.value_bytes
                                                                         : nullptr;
      if (largest != nullptr) *largest = std::max(*largest, tensor.size());
    }
  }
  return sizes;
}

int64_t HeldSlice::LayerBytes(int64_t layer) const {
  int64_t bytes = 0;
  for (const SlicedTensor& tensor : Tensors(layer)) bytes += tensor.size();
  return bytes;
}

}  // namespace structkv::session
