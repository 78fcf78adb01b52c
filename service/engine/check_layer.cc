#include "service/engine/check_layer.h"

#include <cmath>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "service/engine/nonfinite.h"

namespace structkv::engine {
namespace {

const Buffer& TensorOf(const LayerInput& input, InputTensor tensor) {
  switch (tensor) {
    case InputTensor::kKeys:
      return input.keys;
    case InputTensor::kValues:
      return input.values;
    case InputTensor::kWindowQueries:
      return input.window_queries;
    case InputTensor::kWindowLse:
      return input.window_lse;
    case InputTensor::kKeyScales:
      return input.key_scales;
    case InputTensor::kValueScales:
      return input.value_scales;
    case InputTensor::kSaliency:
    case InputTensor::kPositions:  // a view, checked by itself
      return input.saliency;
  }
  return input.keys;
}

// Scales are factors: NaN fails too, and so does a key scale that scores cannot be multiplied by.
// `first_head`: of the model's KV heads, the input's first.
absl::Status CheckScales(const PromptSpec& spec, const LayerInput& input, InputTensor tensor,
                         int64_t first_head) {
  const Buffer& buffer = TensorOf(input, tensor);
  const auto* scales = buffer.as<const float>();
  const bool scored =
      tensor == InputTensor::kKeyScales && spec.statistic == Statistic::kWindowQueries;
  const double factor = scored ? spec.attention_scale.value_or(1) : 1;
  for (size_t i = 0; i < buffer.size() / sizeof(float); ++i) {
    if (scales[i] > 0 && std::isfinite(scales[i]) &&
        std::isfinite(static_cast<float>(factor * scales[i]))) {
      continue;
    }
    const std::string_view name = InputTensorName(tensor);
    absl::Status status = absl::InvalidArgumentError(absl::StrCat(
        "layer ", input.layer, ": ", absl::string_view(name.data(), name.size()), ": that of ",
        spec.kv_scales == KvScales::kPerTensor
            ? "every KV head"
            : absl::StrCat("KV head ", first_head + static_cast<int64_t>(i)),
        " is ", std::isnan(scales[i]) ? NAN : scales[i], "; a finite number above 0 is needed",
        factor == 1 ? "" : absl::StrCat(", times attention_scale (", factor, ") too")));
    return std::isfinite(scales[i]) ? status : MarkNonFinite(std::move(status));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckPositions(const LayerInput& input, const Skeleton* skeleton) {
  if (input.positions.empty()) return absl::OkStatus();
  if (skeleton == nullptr || !skeleton->from_layer.has_value() ||
      input.layer < *skeleton->from_layer) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", input.layer, ": positions: ",
                     skeleton == nullptr ? "the pivot is not decided; full layers are allowed"
                     : skeleton->from_layer.has_value()
                         ? absl::StrCat("allowed from layer ", *skeleton->from_layer, " on")
                         : "no layer past the pivot is left; full layers are allowed"));
  }
  if (input.positions != absl::MakeConstSpan(skeleton->positions)) {
    return absl::InvalidArgumentError(absl::StrCat("layer ", input.layer,
                                                   ": positions: they are not the skeleton of ",
                                                   skeleton->positions.size(), " tokens"));
  }
  return absl::OkStatus();
}

absl::Status CheckTensors(const LayerInput& input, const PromptSpec& spec, int64_t first_head) {
  for (int i = 0; i < kInputTensors; ++i) {
    const auto tensor = static_cast<InputTensor>(i);
    if (tensor == InputTensor::kPositions) continue;
    const auto came = static_cast<int64_t>(TensorOf(input, tensor).size());
    const int64_t needed = !spec.has_input(input.layer) ? 0
                           : input.positions.empty()    ? spec.InputBytes(tensor)
                                                        : spec.SkeletonInputBytes(tensor);
    if (came == needed) continue;
    const std::string_view name = InputTensorName(tensor);
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", input.layer, ": ", absl::string_view(name.data(), name.size()), ": ",
                     came, " bytes came, ", needed, " are needed"));
  }
  absl::Status scales = CheckScales(spec, input, InputTensor::kKeyScales, first_head);
  scales.Update(CheckScales(spec, input, InputTensor::kValueScales, first_head));
  return scales;
}

}  // namespace structkv::engine
