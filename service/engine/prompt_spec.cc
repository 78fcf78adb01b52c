#include "service/engine/prompt_spec.h"

#include <cstddef>

#include "service/method/budget.h"

namespace structkv::engine {

std::string_view InputTensorName(InputTensor tensor) {
  switch (tensor) {
    case InputTensor::kKeys:
      return "keys";
    case InputTensor::kValues:
      return "values";
    case InputTensor::kWindowQueries:
      return "window_queries";
    case InputTensor::kWindowLse:
      return "window_lse";
    case InputTensor::kSaliency:
      return "saliency";
    case InputTensor::kPositions:
      return "positions";
    case InputTensor::kKeyScales:
      return "key_scales";
    case InputTensor::kValueScales:
      return "value_scales";
  }
  return "?";
}

DType PromptSpec::queries() const {
  return query_dtype.value_or(IsFp8(dtype) ? DType::kBF16 : dtype);
}

int64_t PromptSpec::kv_slots(int64_t tokens) const {
  return paged.has_value() ? paged->Slots(tokens) : tokens;
}

int64_t PromptSpec::kv_blocks() const {
  return paged.has_value() && !plan_only ? paged->Blocks(largest_kept_tokens()) : 0;
}

int64_t PromptSpec::scale_count() const {
  if (kv_scales == KvScales::kNone) return 0;
  return kv_scales == KvScales::kPerTensor ? 1 : geometry.kv_heads;
}

int64_t PromptSpec::window_rows() const { return method::WindowRows(method, prompt_tokens); }

int64_t PromptSpec::kept_tokens(int64_t layer) const {
  return method::KeptTokens(method, prompt_tokens, layer, geometry.layers);
}

int64_t PromptSpec::largest_kept_tokens() const {
  return method::LargestKeptTokens(method, prompt_tokens, geometry.layers);
}

int64_t PromptSpec::next_position() const {
  return rotary.has_value() ? largest_kept_tokens() : prompt_tokens;
}

int64_t PromptSpec::skeleton_tokens() const {
  return method::SkeletonTokens(method, prompt_tokens);
}

bool PromptSpec::per_kv_head() const {
  return method.needs_statistics() && method.granularity == method::Granularity::kPerKvHead;
}

bool PromptSpec::may_have_skeleton_layers() const {
  if (method.has_centrality()) return method.pivot.mode != method::PivotMode::kExact;
  return method.method == method::Method::kFastKv;
}

bool PromptSpec::has_input(int64_t layer) const {
  return method.method != method::Method::kGemFilter || layer == method.filter_layer;
}

int64_t PromptSpec::InputBytes(InputTensor tensor) const {
  const int64_t pool = paged.has_value() ? paged->block_count * paged->block_tokens : prompt_tokens;
  return TensorBytes(tensor, prompt_tokens, pool);
}

int64_t PromptSpec::SkeletonInputBytes(InputTensor tensor) const {
  const int64_t tokens = skeleton_tokens();
  if (tensor == InputTensor::kPositions) return tokens * static_cast<int64_t>(sizeof(int32_t));
  return TensorBytes(tensor, tokens, kv_slots(tokens));
}

// Of `tokens`, whose keys and values take the room of `slots`.
int64_t PromptSpec::TensorBytes(InputTensor tensor, int64_t tokens, int64_t slots) const {
  const auto element = static_cast<int64_t>(DTypeSize(dtype));
  constexpr int64_t kFloat = sizeof(float);
  const bool window = statistic == Statistic::kWindowQueries;
  const bool has_keys = !plan_only || window;
  const bool has_values = !plan_only && !geometry.values_in_keys;
  if (pulls(tensor)) return 0;
  switch (tensor) {
    case InputTensor::kKeys:
      return has_keys ? geometry.kv_heads * slots * geometry.key_dim * element : 0;
    case InputTensor::kValues:
      return has_values ? geometry.kv_heads * slots * geometry.value_dim * element : 0;
    case InputTensor::kWindowQueries:
      if (!window) return 0;
      return geometry.query_heads * window_rows() * geometry.key_dim *
             static_cast<int64_t>(DTypeSize(queries()));
    case InputTensor::kWindowLse:
      return window && window_lse ? geometry.query_heads * window_rows() * kFloat : 0;
    case InputTensor::kSaliency:
      if (statistic == Statistic::kSaliency) return tokens * kFloat;
      if (statistic == Statistic::kSaliencyPerKvHead) return geometry.kv_heads * tokens * kFloat;
      return 0;
    case InputTensor::kPositions:
      return 0;
    case InputTensor::kKeyScales:
      return has_keys ? scale_count() * kFloat : 0;
    case InputTensor::kValueScales:
      return has_values ? scale_count() * kFloat : 0;
  }
  return 0;
}

bool PromptSpec::pulls(InputTensor tensor) const {
  if (tensor == InputTensor::kValues) return pull != Pull::kNone;
  return tensor == InputTensor::kKeys && pull == Pull::kKeysAndValues;
}

int64_t PromptSpec::KeptBytes(InputTensor tensor) const {
  const bool values = tensor == InputTensor::kValues;
  if (plan_only || (values && geometry.values_in_keys)) return 0;
  return geometry.kv_heads * kv_slots(largest_kept_tokens()) *
         (values ? geometry.value_dim : geometry.key_dim) * static_cast<int64_t>(DTypeSize(dtype));
}

int64_t PromptSpec::PulledBytes(InputTensor tensor, int64_t kept) const {
  if (!pulls(tensor)) return 0;
  const int64_t dim = tensor == InputTensor::kKeys ? geometry.key_dim : geometry.value_dim;
  return geometry.kv_heads * kept * dim * static_cast<int64_t>(DTypeSize(dtype));
}

std::vector<InputTensor> PromptSpec::RequiredTensors() const {
  std::vector<InputTensor> tensors;
  for (int i = 0; i < kInputTensors; ++i) {
    const auto tensor = static_cast<InputTensor>(i);
    if (InputBytes(tensor) > 0) tensors.push_back(tensor);
  }
  return tensors;
}

}  // namespace structkv::engine
