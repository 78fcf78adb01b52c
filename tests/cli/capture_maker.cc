#include "tests/cli/capture_maker.h"

#include <map>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cli/capture.h"
#include "client/cli/safetensors_writer.h"
#include "tests/testing/prompt_data.h"

namespace structkv::cli {
namespace {

using testkit::PromptData;

// One tensor of every layer.
struct Part {
  const char* suffix;
  const PromptData* data;
  v1::Tensor tensor;
  std::string dtype;
  std::vector<int64_t> shape;
};

std::map<std::string, std::string> Metadata(const v1::Open& open, uint32_t window) {
  const v1::ModelGeometry& geometry = open.geometry();
  std::map<std::string, std::string> metadata = {
      {"layers", absl::StrCat(geometry.layer_count())},
      {"query_heads", absl::StrCat(geometry.query_head_count())},
      {"kv_heads", absl::StrCat(geometry.kv_head_count())},
      {"head_dim", absl::StrCat(geometry.key_dim())},
      {"prompt_tokens", absl::StrCat(open.prompt_tokens())},
      {"window_tokens", absl::StrCat(window)},
      {"layout", open.layout() == v1::LAYOUT_HEAD_TOKEN_DIM ? "head_token_dim" : "token_head_dim"}};
  if (geometry.value_dim() != 0) metadata["value_dim"] = absl::StrCat(geometry.value_dim());
  if (geometry.values_in_keys()) metadata["values_in_keys"] = "true";
  if (open.has_attention_scale()) {
    metadata["attention_scale"] = absl::StrFormat("%.17g", open.attention_scale());
  }
  return metadata;
}

}  // namespace

absl::Status WriteCapture(const std::string& path, const v1::Open& open, uint32_t future_tokens,
                          uint64_t seed) {
  const PromptData prompt(open, seed);
  v1::Open after = open;  // its window is all of it
  after.set_prompt_tokens(future_tokens);
  after.set_layout(v1::LAYOUT_HEAD_TOKEN_DIM);
  after.mutable_method()->mutable_structkv()->set_window_tokens(future_tokens);
  const PromptData future(after, seed + 1);

  const v1::ModelGeometry& geometry = open.geometry();
  const int64_t queries = geometry.query_head_count();
  const int64_t heads = geometry.kv_head_count();
  const int64_t key_dim = geometry.key_dim();
  const int64_t value_dim = prompt.effective().value_dim;
  const int64_t tokens = open.prompt_tokens();
  const int64_t window = prompt.effective().window;
  const std::string dtype(SafetensorsName(open.dtype()));
  const std::string query_dtype(SafetensorsName(prompt.effective().query_dtype));
  const auto kv_shape = [&](int64_t dim) -> std::vector<int64_t> {
    if (open.layout() == v1::LAYOUT_HEAD_TOKEN_DIM) return {heads, tokens, dim};
    return {tokens, heads, dim};
  };
  std::vector<Part> parts = {
      {"k", &prompt, v1::TENSOR_KEYS, dtype, kv_shape(key_dim)},
      {"q_window", &prompt, v1::TENSOR_WINDOW_QUERIES, query_dtype, {queries, window, key_dim}},
      {"k_future", &future, v1::TENSOR_KEYS, dtype, {heads, future_tokens, key_dim}},
      {"q_future",
       &future,
       v1::TENSOR_WINDOW_QUERIES,
       query_dtype,
       {queries, future_tokens, key_dim}},
  };
  if (!geometry.values_in_keys()) {
    parts.push_back({"v", &prompt, v1::TENSOR_VALUES, dtype, kv_shape(value_dim)});
    parts.push_back(
        {"v_future", &future, v1::TENSOR_VALUES, dtype, {heads, future_tokens, value_dim}});
  }
  if (const int64_t scales = prompt.effective().scales; scales > 0) {
    parts.push_back({"k_scale", &prompt, v1::TENSOR_KEY_SCALES, "F32", {scales}});
    if (!geometry.values_in_keys()) {
      parts.push_back({"v_scale", &prompt, v1::TENSOR_VALUE_SCALES, "F32", {scales}});
    }
  }
  std::vector<TensorDeclaration> declarations;
  for (uint32_t layer = 0; layer < prompt.layers(); ++layer) {
    for (const Part& part : parts) {
      declarations.push_back(
          {absl::StrCat("layer.", layer, ".", part.suffix), part.dtype, part.shape});
    }
  }
  absl::StatusOr<std::unique_ptr<SafetensorsWriter>> writer =
      SafetensorsWriter::Create(path, std::move(declarations));
  if (!writer.ok()) return writer.status();
  for (uint32_t layer = 0; layer < prompt.layers(); ++layer) {
    for (const Part& part : parts) {
      const std::string& bytes = part.data->tensor(layer, part.tensor);
      absl::Status status = (*writer)->WriteValues(absl::StrCat("layer.", layer, ".", part.suffix),
                                                   absl::MakeConstSpan(bytes.data(), bytes.size()));
      if (!status.ok()) return status;
    }
  }
  return (*writer)->Finish(Metadata(open, static_cast<uint32_t>(window)));
}

absl::Status WriteWidened(const Capture& capture, const std::string& path) {
  const absl::StatusOr<std::shared_ptr<const SafetensorsFile>> file =
      SafetensorsFile::Open(capture.path());
  if (!file.ok()) return file.status();
  const auto is_scale = [](const std::string& name) {
    return name.find("_scale") != std::string::npos;
  };
  std::vector<TensorDeclaration> declarations;
  for (const auto& [name, info] : (*file)->tensors()) {
    if (!is_scale(name)) declarations.push_back({name, "F32", info.shape});
  }
  absl::StatusOr<std::unique_ptr<SafetensorsWriter>> writer =
      SafetensorsWriter::Create(path, std::move(declarations));
  if (!writer.ok()) return writer.status();
  const bool head_first = capture.layout() == v1::LAYOUT_HEAD_TOKEN_DIM;
  for (const auto& [name, info] : (*file)->tensors()) {
    if (is_scale(name)) continue;
    const absl::Span<const std::byte> data = (*file)->Data(info);
    const std::string bytes(reinterpret_cast<const char*>(data.data()), data.size());
    std::vector<float> values(data.size() / SafetensorsElementBytes(info.dtype));
    const auto layer = static_cast<uint32_t>(std::stoul(name.substr(sizeof("layer"))));
    const std::string suffix = name.substr(name.find_last_of('.') + 1);
    const bool keys = suffix[0] == 'k';
    const bool queries = suffix[0] == 'q';
    const bool first = head_first || suffix.size() > 1;  // future tokens are [kv_head, token, dim]
    const size_t dim = static_cast<size_t>(info.shape[2]);
    for (size_t i = 0; i < values.size(); ++i) {
      const size_t row = i / dim;
      const size_t head = first ? row / static_cast<size_t>(info.shape[1])
                                : row % static_cast<size_t>(info.shape[1]);
      const float scale = queries ? 1
                                  : capture.Scale(layer, keys ? v1::TENSOR_KEYS : v1::TENSOR_VALUES,
                                                  static_cast<uint32_t>(head));
      values[i] = scale * static_cast<float>(
                              testkit::ElementAt(DTypeFromSafetensors(info.dtype), bytes, i));
    }
    absl::Status status = (*writer)->WriteValues(name, absl::MakeConstSpan(values));
    if (!status.ok()) return status;
  }
  return (*writer)->Finish((*file)->metadata());
}

}  // namespace structkv::cli
