// A synthetic prompt by the client library.
#pragma once

#include <cstdint>
#include <string>

#include "absl/types/span.h"
#include "structkv/result.h"
#include "structkv/session.h"
#include "tests/testing/prompt_data.h"

namespace structkv::testkit {

inline absl::Span<const std::byte> AsBytes(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

inline std::string AsText(const client::Bytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

inline client::LayerTensors TensorsOf(const PromptData& data, uint32_t layer) {
  client::LayerTensors tensors;
  tensors.keys = AsBytes(data.tensor(layer, v1::TENSOR_KEYS));
  tensors.values = AsBytes(data.tensor(layer, v1::TENSOR_VALUES));
  tensors.window_queries = AsBytes(data.tensor(layer, v1::TENSOR_WINDOW_QUERIES));
  tensors.window_lse = AsBytes(data.tensor(layer, v1::TENSOR_WINDOW_LSE));
  tensors.key_scales = AsBytes(data.tensor(layer, v1::TENSOR_KEY_SCALES));
  tensors.value_scales = AsBytes(data.tensor(layer, v1::TENSOR_VALUE_SCALES));
  tensors.saliency = AsBytes(data.tensor(layer, v1::TENSOR_SALIENCY));
  tensors.positions = data.rows(layer);
  return tensors;
}

// Everything that a caller keeps of a layer.
inline std::string Text(const client::LayerResult& layer) {
  return std::to_string(layer.kept_tokens) + AsText(layer.positions) + AsText(layer.keys) +
         AsText(layer.values) + AsText(layer.saliency);
}

inline std::string Text(const client::Compressed& compressed) {
  std::string text;
  for (const client::LayerResult& layer : compressed.layers) text += Text(layer);
  if (compressed.pivot.has_value()) {
    for (const int32_t token : compressed.pivot->skeleton) text += std::to_string(token) + ",";
  }
  return text;
}

}  // namespace structkv::testkit
