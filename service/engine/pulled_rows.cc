#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "service/engine/prompt.h"

namespace structkv::engine {

absl::Status TakeRows(const PromptSpec& spec, Buffer keys, Buffer values, LayerOutput* output) {
  const struct {
    InputTensor tensor;
    Buffer* rows;
    Buffer* out;
  } tensors[] = {{InputTensor::kKeys, &keys, &output->keys},
                 {InputTensor::kValues, &values, &output->values}};
  for (const auto& [tensor, rows, out] : tensors) {
    const int64_t needed = spec.PulledBytes(tensor, output->kept_tokens);
    if (static_cast<int64_t>(rows->size()) != needed) {
      return absl::InvalidArgumentError(
          absl::StrCat("layer ", output->layer, ": ", std::string(InputTensorName(tensor)), ": ",
                       rows->size(), " bytes of rows came, ", needed, " are needed"));
    }
    if (needed > 0) *out = std::move(*rows);
  }
  return absl::OkStatus();
}

}  // namespace structkv::engine
