#include <cstring>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "service/engine/prompt.h"

namespace structkv::engine {

absl::Status TakeRows(const PromptSpec& spec, BufferPool& pool, LayerInput rows,
                      LayerOutput* output) {
  const struct {
    InputTensor tensor;
    Buffer* rows;
    Buffer* room;
    Buffer* out;
  } tensors[] = {{InputTensor::kKeys, &rows.keys, &rows.key_room, &output->keys},
                 {InputTensor::kValues, &rows.values, &rows.value_room, &output->values}};
  for (const auto& [tensor, came, room, out] : tensors) {
    const int64_t needed = spec.PulledBytes(tensor, output->kept_tokens);
    if (static_cast<int64_t>(came->size()) != needed) {
      return absl::InvalidArgumentError(
          absl::StrCat("layer ", output->layer, ": ", std::string(InputTensorName(tensor)), ": ",
                       came->size(), " bytes of rows came, ", needed, " are needed"));
    }
    if (needed == 0) continue;
    if (!came->is_lent() && room->empty()) {
      *out = std::move(*came);
      continue;
    }
    *out = room->empty() ? pool.Acquire(came->size()) : std::move(*room);
    out->Truncate(came->size());
    std::memcpy(out->data(), came->data(), came->size());
  }
  return absl::OkStatus();
}

}  // namespace structkv::engine
