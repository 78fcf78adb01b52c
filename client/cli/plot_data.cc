#include "client/cli/plot_data.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace structkv::cli {
namespace {

absl::Status Invalid(const SafetensorsFile& file, const std::string& text) {
  return absl::InvalidArgumentError(absl::StrCat(file.path(), ": ", text));
}

std::optional<uint32_t> Count(const SafetensorsFile& file, const char* key) {
  const auto it = file.metadata().find(key);
  uint32_t value = 0;
  if (it == file.metadata().end() || !absl::SimpleAtoi(it->second, &value)) return std::nullopt;
  return value;
}

std::optional<double> Number(const SafetensorsFile& file, const char* key) {
  const auto it = file.metadata().find(key);
  double value = 0;
  if (it == file.metadata().end() || !absl::SimpleAtod(it->second, &value)) return std::nullopt;
  return value;
}

std::string Text(const SafetensorsFile& file, const char* key) {
  const auto it = file.metadata().find(key);
  return it == file.metadata().end() ? "" : it->second;
}

absl::Status ReadPositions(const SafetensorsFile& file, PlotData* data) {
  for (uint32_t layer = 0;; ++layer) {
    const std::string name = absl::StrCat("layer.", layer, ".positions");
    const TensorInfo* info = file.Find(name);
    if (info == nullptr) break;
    if (info->dtype != "I32" || info->shape.empty() || info->shape.size() > 2) {
      return Invalid(
          file, absl::StrCat("tensor '", name, "' is ", info->dtype, " ", ShapeText(info->shape),
                             ", I32 [kept] or [kv_heads, kept] expected"));
    }
    const auto kept = static_cast<uint32_t>(info->shape.back());
    if (layer == 0)
      data->heads = info->shape.size() == 2 ? static_cast<uint32_t>(info->shape[0]) : 1;
    if (kept > 0) {
      data->kept_tokens = std::max(data->kept_tokens, kept);
      data->least_kept_tokens =
          data->least_kept_tokens == 0 ? kept : std::min(data->least_kept_tokens, kept);
    }
    data->positions.push_back(file.Values<int32_t>(*info));
    for (int32_t position : data->positions.back()) {
      if (position < 0 || static_cast<uint32_t>(position) >= data->prompt_tokens) {
        return Invalid(file, absl::StrCat("tensor '", name, "' holds position ", position, " of ",
                                          data->prompt_tokens, " tokens"));
      }
    }
  }
  if (data->positions.empty()) {
    return Invalid(file, "tensor 'layer.0.positions' is missing; this is no compacted cache");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<PlotData> ReadPlotData(const SafetensorsFile& file) {
  PlotData data;
  const std::optional<uint32_t> tokens = Count(file, "logical_length");
  if (!tokens.has_value() || *tokens == 0) {
    return Invalid(file, "metadata 'logical_length' is missing; this is no compacted cache");
  }
  data.prompt_tokens = *tokens;
  data.method = Text(file, "method");
  data.model = Text(file, "model_id");
  absl::Status status = ReadPositions(file, &data);
  if (!status.ok()) return status;
  const size_t layers = data.positions.size();
  for (const auto& [name, out] :
       {std::pair("metrics.entropy", &data.entropy), std::pair("metrics.sparsity", &data.sparsity),
        std::pair("metrics.variance", &data.variance),
        std::pair("metrics.transition", &data.transition)}) {
    const TensorInfo* info = file.Find(name);
    if (info == nullptr) continue;
    if (info->dtype != "F32" || info->shape != std::vector<int64_t>{static_cast<int64_t>(layers)}) {
      return Invalid(file, absl::StrCat("tensor '", name, "' is ", info->dtype, " ",
                                        ShapeText(info->shape), ", F32 [", layers, "] expected"));
    }
    *out = file.Values<float>(*info);
  }
  if (const TensorInfo* skeleton = file.Find("skeleton.positions")) {
    if (skeleton->dtype == "I32") data.skeleton = file.Values<int32_t>(*skeleton);
  }
  data.pivot_layer = Count(file, "pivot_layer");
  data.transition_layer = Count(file, "transition_layer");
  data.pivot_mode = Text(file, "pivot_mode");
  data.decided_at_layer = Count(file, "decided_at_layer");
  const std::optional<double> begin = Number(file, "method.pivot.search_begin");
  const std::optional<double> end = Number(file, "method.pivot.search_end");
  if (data.transition_layer.has_value() && begin.has_value() && end.has_value() && layers >= 3) {
    const auto depth = static_cast<double>(layers);
    data.search = {static_cast<uint32_t>(std::ceil(*begin * depth)),
                   static_cast<uint32_t>(std::min(std::floor(*end * depth), depth - 2))};
  }
  return data;
}

}  // namespace structkv::cli
