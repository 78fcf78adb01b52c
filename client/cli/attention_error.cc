#include "client/cli/attention_error.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "structkv/sizes.h"

namespace structkv::cli {
namespace {

float FromHalf(uint16_t half) {
  const uint32_t exponent = half >> 10 & 0x1F;
  const uint32_t mantissa = half & 0x3FF;
  float value = 0;
  if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -24);
  } else if (exponent == 31) {
    value = mantissa == 0 ? INFINITY : NAN;
  } else {
    value = std::ldexp(static_cast<float>(mantissa | 0x400), static_cast<int>(exponent) - 25);
  }
  return (half & 0x8000) != 0 ? -value : value;
}

float FromE4M3(uint8_t code) {
  const int exponent = code >> 3 & 0xF;
  const int mantissa = code & 0x7;
  float value = 0;
  if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -9);
  } else if (exponent == 15 && mantissa == 7) {
    value = NAN;
  } else {
    value = std::ldexp(static_cast<float>(mantissa | 0x8), exponent - 10);
  }
  return (code & 0x80) != 0 ? -value : value;
}

float LoadElement(const std::byte* data, v1::DType dtype) {
  if (dtype == v1::DTYPE_F8_E4M3) return FromE4M3(std::to_integer<uint8_t>(*data));
  // E5M2 is binary16 without its lower byte.
  if (dtype == v1::DTYPE_F8_E5M2) {
    return FromHalf(static_cast<uint16_t>(std::to_integer<uint16_t>(*data) << 8));
  }
  if (dtype == v1::DTYPE_F32) {
    float value = 0;
    std::memcpy(&value, data, sizeof value);
    return value;
  }
  uint16_t bits = 0;
  std::memcpy(&bits, data, sizeof bits);
  if (dtype == v1::DTYPE_F16) return FromHalf(bits);
  const uint32_t wide = uint32_t{bits} << 16;
  float value = 0;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// A [heads, rows, dim] tensor in either layout, or the first `dim` elements of its rows.
struct Source {
  absl::Span<const std::byte> data;
  v1::DType dtype;
  v1::Layout layout;
  size_t heads;
  size_t rows;
  size_t dim;
  size_t row_dim;

  // Appends one head's rows as floats, times `factor`.
  void AppendHead(size_t head, float factor, std::vector<float>* out) const {
    const size_t element = client::ElementBytes(dtype);
    for (size_t row = 0; row < rows; ++row) {
      const size_t index =
          layout == v1::LAYOUT_HEAD_TOKEN_DIM ? head * rows + row : row * heads + head;
      const std::byte* at = data.data() + index * row_dim * element;
      for (size_t i = 0; i < dim; ++i) {
        out->push_back(factor * LoadElement(at + i * element, dtype));
      }
    }
  }
};

float Dot(const float* a, const float* b, size_t n) {
  constexpr size_t kLanes = 16;
  float sums[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  float sum = 0;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (float lane : sums) sum += lane;
  return sum;
}

// Attention of one query over the first `rows` rows.
void Attend(const float* query, const std::vector<float>& keys, const std::vector<float>& values,
            size_t rows, size_t key_dim, size_t value_dim, float scale, std::vector<float>* scores,
            float* out) {
  scores->resize(rows);
  float highest = -INFINITY;
  for (size_t row = 0; row < rows; ++row) {
    (*scores)[row] = scale * Dot(query, keys.data() + row * key_dim, key_dim);
    highest = std::max(highest, (*scores)[row]);
  }
  std::vector<double> sums(value_dim);
  double total = 0;
  for (size_t row = 0; row < rows; ++row) {
    const double weight = std::exp(static_cast<double>((*scores)[row] - highest));
    total += weight;
    const float* value = values.data() + row * value_dim;
    for (size_t i = 0; i < value_dim; ++i) sums[i] += weight * static_cast<double>(value[i]);
  }
  for (size_t i = 0; i < value_dim; ++i) out[i] = static_cast<float>(sums[i] / total);
}

std::vector<float> AttendLayer(const Capture& capture, uint32_t layer,
                               absl::Span<const std::byte> keys, absl::Span<const std::byte> values,
                               size_t rows) {
  const v1::ModelGeometry& geometry = capture.geometry();
  const size_t kv_heads = geometry.kv_head_count();
  const size_t group = geometry.query_head_count() / kv_heads;
  const size_t key_dim = geometry.key_dim();
  const size_t value_dim = geometry.value_dim();
  const size_t future = capture.future_tokens();
  const v1::DType dtype = capture.dtype();
  constexpr v1::Layout kHeadFirst = v1::LAYOUT_HEAD_TOKEN_DIM;
  const FutureTensors after = capture.Future(layer);
  const auto scale = static_cast<float>(capture.attention_scale());
  const Source prompt_keys{keys, dtype, capture.layout(), kv_heads, rows, key_dim, key_dim};
  const Source future_keys{after.keys, dtype, kHeadFirst, kv_heads, future, key_dim, key_dim};
  Source prompt_values{values, dtype, capture.layout(), kv_heads, rows, value_dim, value_dim};
  Source future_values{after.values, dtype, kHeadFirst, kv_heads, future, value_dim, value_dim};
  if (geometry.values_in_keys()) {
    prompt_values = prompt_keys;
    future_values = future_keys;
    prompt_values.dim = future_values.dim = value_dim;
  }
  const Source queries{
      after.queries, capture.query_dtype(), kHeadFirst, kv_heads * group, future, key_dim, key_dim};

  std::vector<float> out(kv_heads * group * future * value_dim);
  std::vector<float> head_keys;
  std::vector<float> head_values;
  std::vector<float> head_queries;
  std::vector<float> scores;
  for (size_t head = 0; head < kv_heads; ++head) {
    head_keys.clear();
    head_values.clear();
    head_queries.clear();
    const auto index = static_cast<uint32_t>(head);
    const float key_scale = capture.Scale(layer, v1::TENSOR_KEYS, index);
    const float value_scale = capture.Scale(layer, v1::TENSOR_VALUES, index);
    prompt_keys.AppendHead(head, key_scale, &head_keys);
    future_keys.AppendHead(head, key_scale, &head_keys);
    prompt_values.AppendHead(head, value_scale, &head_values);
    future_values.AppendHead(head, value_scale, &head_values);
    for (size_t i = 0; i < group; ++i) queries.AppendHead(head * group + i, 1, &head_queries);
    for (size_t i = 0; i < group * future; ++i) {
      Attend(head_queries.data() + i * key_dim, head_keys, head_values, rows + i % future + 1,
             key_dim, value_dim, scale, &scores,
             out.data() + (head * group * future + i) * value_dim);
    }
  }
  return out;
}

absl::Status CheckFuture(const Capture& capture) {
  if (capture.future_tokens() > 0) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(capture.path(), ": the capture has no future tokens (layer.*.q_future)"));
}

}  // namespace

absl::StatusOr<AttentionOutputs> FullAttention(const Capture& capture) {
  absl::Status status = CheckFuture(capture);
  if (!status.ok()) return status;
  v1::Opened everything;
  everything.add_required_tensors(v1::TENSOR_KEYS);
  if (!capture.geometry().values_in_keys()) everything.add_required_tensors(v1::TENSOR_VALUES);
  AttentionOutputs outputs;
  for (uint32_t layer = 0; layer < capture.geometry().layer_count(); ++layer) {
    absl::StatusOr<client::LayerTensors> tensors = capture.Layer(layer, everything);
    if (!tensors.ok()) return tensors.status();
    outputs.push_back(
        AttendLayer(capture, layer, tensors->keys, tensors->values, capture.prompt_tokens()));
  }
  return outputs;
}

absl::StatusOr<AttentionOutputs> CompactedAttention(const Capture& capture,
                                                    const client::Compressed& compressed) {
  absl::Status status = CheckFuture(capture);
  if (!status.ok()) return status;
  AttentionOutputs outputs;
  for (const client::LayerResult& layer : compressed.layers) {
    if (layer.keys.empty()) {
      return absl::FailedPreconditionError("a plan has no keys to attend to");
    }
    outputs.push_back(AttendLayer(capture, layer.layer, layer.keys.span(), layer.values.span(),
                                  layer.kept_tokens));
  }
  return outputs;
}

AttentionError CompareAttention(const AttentionOutputs& full, const AttentionOutputs& compacted) {
  AttentionError error;
  for (size_t layer = 0; layer < full.size() && layer < compacted.size(); ++layer) {
    double difference = 0;
    double norm = 0;
    for (size_t i = 0; i < full[layer].size(); ++i) {
      const double want = full[layer][i];
      const double got = compacted[layer][i];
      difference += (got - want) * (got - want);
      norm += want * want;
    }
    const double relative = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
    error.layers.push_back(relative);
    error.mean += relative;
    if (relative > error.worst || layer == 0) {
      error.worst = relative;
      error.worst_layer = layer;
    }
  }
  if (!error.layers.empty()) error.mean /= static_cast<double>(error.layers.size());
  return error;
}

}  // namespace structkv::cli
