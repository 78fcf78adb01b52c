#include "tests/testing/engine_answer.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>

#include "service/rpc/open_decoder.h"

namespace structkv::testkit {
namespace {

std::string BytesOf(const void* data, size_t size) {
  return {static_cast<const char*>(data), size};
}

template <typename T>
std::string BytesOf(const std::vector<T>& values) {
  return BytesOf(values.data(), values.size() * sizeof(T));
}

void SetTensor(std::map<v1::Tensor, std::string>* tensors, v1::Tensor tensor, std::string bytes) {
  if (!bytes.empty()) (*tensors)[tensor] = std::move(bytes);
}

}  // namespace

engine::PromptSpec SpecOf(const v1::Open& open) {
  const BackendCapabilities capabilities = {
      .dtypes = {DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3, DType::kF8E5M2},
      .layouts = {Layout::kHeadTokenDim, Layout::kTokenHeadDim},
      .paged = true};
  const absl::StatusOr<rpc::OpenRequest> request = rpc::DecodeOpen(open, rpc::kDefaultMessageBytes);
  const absl::Status status =
      request.ok() ? engine::ValidateSpec(request->spec, {}, capabilities) : request.status();
  if (!status.ok()) {
    std::fprintf(stderr, "the test's prompt: %s\n", status.ToString().c_str());
    std::abort();
  }
  return request->spec;
}

engine::LayerInput InputOf(const PromptData& data, uint32_t layer, engine::BufferPool* pool) {
  const auto copy = [&](v1::Tensor tensor) {
    const std::string& bytes = data.tensor(layer, tensor);
    engine::Buffer buffer = pool->Acquire(bytes.size());
    if (!bytes.empty()) std::memcpy(buffer.data(), bytes.data(), bytes.size());
    return buffer;
  };
  return {.layer = layer,
          .keys = copy(v1::TENSOR_KEYS),
          .values = copy(v1::TENSOR_VALUES),
          .window_queries = copy(v1::TENSOR_WINDOW_QUERIES),
          .window_lse = copy(v1::TENSOR_WINDOW_LSE),
          .saliency = copy(v1::TENSOR_SALIENCY),
          .key_scales = copy(v1::TENSOR_KEY_SCALES),
          .value_scales = copy(v1::TENSOR_VALUE_SCALES),
          .positions = data.rows(layer)};
}

void AddLayer(const engine::LayerOutput& output, Answer* answer) {
  const auto index = static_cast<uint32_t>(output.layer);
  if (answer->layers.contains(index)) answer->faults.emplace_back("a layer was answered twice");
  LayerAnswer& layer = answer->layers[index];
  answer->order.push_back(index);
  layer.kept_tokens = static_cast<uint32_t>(output.kept_tokens);
  layer.kept_blocks = static_cast<uint32_t>(output.kept_blocks);
  if (output.metrics.has_value()) {
    layer.metrics = rpc::EncodeMetrics(output.layer, *output.metrics);
  }
  SetTensor(&layer.tensors, v1::TENSOR_POSITIONS, BytesOf(output.positions));
  SetTensor(&layer.tensors, v1::TENSOR_KEYS, BytesOf(output.keys.data(), output.keys.size()));
  SetTensor(&layer.tensors, v1::TENSOR_VALUES, BytesOf(output.values.data(), output.values.size()));
  SetTensor(&layer.tensors, v1::TENSOR_KEY_SCALES,
            BytesOf(output.key_scales.data(), output.key_scales.size()));
  SetTensor(&layer.tensors, v1::TENSOR_VALUE_SCALES,
            BytesOf(output.value_scales.data(), output.value_scales.size()));
  SetTensor(&layer.tensors, v1::TENSOR_SALIENCY,
            BytesOf(output.saliency.data(), output.saliency.size()));
}

void AddPivot(const engine::PivotResult& result, Answer* answer) {
  if (answer->pivot.has_value()) answer->faults.emplace_back("a second pivot");
  answer->pivot.emplace().decision = rpc::EncodePivot(result.decision);
  answer->layers_before_pivot = answer->layers.size();
  SetTensor(&answer->pivot->tensors, v1::TENSOR_SKELETON_POSITIONS, BytesOf(result.skeleton));
  SetTensor(&answer->pivot->tensors, v1::TENSOR_CENTRALITY, BytesOf(result.centrality));
}

std::vector<uint32_t> InOrder(uint32_t count) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0U);
  return order;
}

absl::StatusOr<Answer> CompressDirectly(const PromptData& data, const Backend& backend,
                                        engine::BufferPool* pool,
                                        const std::vector<uint32_t>& order, ParallelFor parallel) {
  engine::Prompt prompt(SpecOf(data.open()), &backend, pool);
  Answer answer;
  for (const uint32_t layer : order) {
    absl::StatusOr<engine::LayerOutput> output =
        prompt.CompressLayer(InputOf(data, layer, pool), parallel);
    if (!output.ok()) return output.status();
    AddLayer(*output, &answer);
    if (const std::optional<engine::PivotResult> pivot = prompt.TakePivot()) {
      AddPivot(*pivot, &answer);
    }
  }
  if (prompt.done() != (answer.layers.size() == data.layers())) {
    answer.faults.emplace_back("done() is wrong");
  }
  return answer;
}

}  // namespace structkv::testkit
