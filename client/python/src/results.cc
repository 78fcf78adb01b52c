#include "results.h"

#include <nanobind/stl/optional.h>

#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "message.h"
#include "shapes.h"
#include "tensor.h"

namespace structkv::python {

namespace nb = nanobind;

namespace {

nb::object Result(const char* name, const nb::dict& fields) {
  return nb::module_::import_("structkv.results").attr(name)(**fields);
}

nb::object Metrics(const std::vector<v1::LayerMetrics>& layers) {
  nb::list list;
  for (const v1::LayerMetrics& layer : layers) list.append(FromMessage(layer));
  return nb::tuple(list);
}

// A vector's elements as a tensor.
template <typename T>
nb::object Values(std::vector<T> values, const Element& element) {
  const auto count = static_cast<int64_t>(values.size());
  auto owner = std::make_shared<std::vector<T>>(std::move(values));
  return TensorOrNone(
      {reinterpret_cast<std::byte*>(owner->data()), owner->size() * sizeof(T), owner}, element,
      {count}, std::nullopt);
}

nb::object FromPivot(client::PivotResult pivot) {
  nb::dict fields;
  fields["pivot_layer"] = pivot.pivot_layer;
  fields["transition_layer"] = pivot.transition_layer;
  fields["mode"] = FromEnum(v1::PivotMode_descriptor(), pivot.mode);
  fields["decided_at_layer"] = pivot.decided_at_layer;
  fields["skeleton_from_layer"] = pivot.skeleton_from_layer;
  fields["profiled_prompts"] = pivot.profiled_prompts;
  fields["layers"] = Metrics(pivot.layers);
  fields["skeleton"] = Values(std::move(pivot.skeleton), Int32());
  fields["centrality"] = Values(std::move(pivot.centrality), Float32());
  return Result("PivotResult", fields);
}

}  // namespace

nb::object FromLayer(const client::LayerResult& layer, const Prompt& prompt) {
  const v1::Open& open = prompt.open;
  const v1::Opened& opened = prompt.opened;
  const auto tensor = [&](v1::Tensor which, const client::Bytes& bytes, uint32_t tokens) {
    return TensorOrNone(bytes, ElementOf(open, which), OutputShape(open, opened, which, tokens),
                        prompt.gpu.Find(bytes.span()));
  };
  // A layer of skeleton rows has saliency of the skeleton alone.
  const Shape row = OutputShape(open, opened, v1::TENSOR_SALIENCY, 1);
  const size_t rows = row.size() == 2 ? static_cast<size_t>(row.front()) : 1;
  const auto tokens = static_cast<uint32_t>(layer.saliency.size() / sizeof(float) / rows);
  nb::dict fields;
  fields["layer"] = layer.layer;
  fields["kept_tokens"] = layer.kept_tokens;
  fields["kept_blocks"] = layer.kept_blocks;
  fields["metrics"] = layer.metrics.has_value() ? FromMessage(*layer.metrics) : nb::none();
  fields["positions"] = tensor(v1::TENSOR_POSITIONS, layer.positions, layer.kept_tokens);
  fields["keys"] = tensor(v1::TENSOR_KEYS, layer.keys, layer.kept_tokens);
  fields["values"] = tensor(v1::TENSOR_VALUES, layer.values, layer.kept_tokens);
  fields["key_scales"] = tensor(v1::TENSOR_KEY_SCALES, layer.key_scales, 1);
  fields["value_scales"] = tensor(v1::TENSOR_VALUE_SCALES, layer.value_scales, 1);
  fields["saliency"] = tensor(v1::TENSOR_SALIENCY, layer.saliency, tokens);
  return Result("LayerResult", fields);
}

nb::object FromEvent(client::Event event, const Prompt& prompt) {
  if (const auto* layer = std::get_if<client::LayerResult>(&event)) {
    return FromLayer(*layer, prompt);
  }
  if (auto* pivot = std::get_if<client::PivotResult>(&event)) return FromPivot(std::move(*pivot));
  return FromMessage(std::get<v1::Summary>(event));
}

nb::object FromPull(const client::RowPull& pull, const Prompt& prompt) {
  nb::dict fields;
  fields["layer"] = pull.layer;
  fields["kept_tokens"] = pull.kept_tokens;
  fields["keys"] = pull.keys;
  fields["positions"] =
      TensorOrNone(pull.positions, Int32(),
                   OutputShape(prompt.open, prompt.opened, v1::TENSOR_POSITIONS, pull.kept_tokens),
                   std::nullopt);
  return Result("RowPull", fields);
}

nb::object FromFetched(const client::FetchedCache& fetched, const GpuPlaces& gpu) {
  Prompt prompt;
  prompt.open = client::OpenOf(fetched.info);
  prompt.opened = client::OpenedOf(fetched.info);
  prompt.gpu = gpu;
  nb::list layers;
  for (const client::LayerResult& layer : fetched.layers) {
    layers.append(FromLayer(layer, prompt));
  }
  nb::dict fields;
  fields["info"] = FromMessage(fetched.info);
  fields["layers"] = nb::tuple(layers);
  fields["attempts"] = fetched.attempts;
  return Result("FetchedCache", fields);
}

}  // namespace structkv::python
