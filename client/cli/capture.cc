#include "client/cli/capture.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "structkv/sizes.h"

namespace structkv::cli {
namespace {

// Largest value of a count in the metadata; keeps products of a few of them inside 64 bits.
constexpr uint32_t kMaxCount = 1U << 30;

std::string Name(uint32_t layer, const char* suffix) {
  return absl::StrCat("layer.", layer, ".", suffix);
}

// The last `rows` of `all_rows` rows of each of `heads` heads, contiguous.
std::shared_ptr<std::vector<std::byte>> LastRows(absl::Span<const std::byte> data, uint64_t heads,
                                                 uint64_t all_rows, uint64_t rows) {
  const uint64_t head_bytes = data.size() / heads;
  const uint64_t row_bytes = head_bytes / all_rows;
  auto out = std::make_shared<std::vector<std::byte>>(heads * rows * row_bytes);
  for (uint64_t head = 0; head < heads; ++head) {
    std::memcpy(out->data() + head * rows * row_bytes,
                data.data() + head * head_bytes + (all_rows - rows) * row_bytes, rows * row_bytes);
  }
  return out;
}

// Of `runs` runs of one row a token, the rows of `tokens`.
std::vector<std::byte> Rows(absl::Span<const std::byte> data, uint64_t runs, uint64_t all_tokens,
                            absl::Span<const int32_t> tokens) {
  const uint64_t row_bytes = data.size() / runs / all_tokens;
  std::vector<std::byte> out(runs * tokens.size() * row_bytes);
  std::byte* to = out.data();
  for (uint64_t run = 0; run < runs; ++run) {
    for (const int32_t token : tokens) {
      std::memcpy(to, data.data() + (run * all_tokens + static_cast<uint64_t>(token)) * row_bytes,
                  row_bytes);
      to += row_bytes;
    }
  }
  return out;
}

}  // namespace

v1::DType DTypeFromSafetensors(std::string_view name) {
  if (name == "F32") return v1::DTYPE_F32;
  if (name == "F16") return v1::DTYPE_F16;
  if (name == "BF16") return v1::DTYPE_BF16;
  if (name == "F8_E4M3") return v1::DTYPE_F8_E4M3;
  if (name == "F8_E5M2") return v1::DTYPE_F8_E5M2;
  return v1::DTYPE_UNSPECIFIED;
}

std::string_view SafetensorsName(v1::DType dtype) {
  switch (dtype) {
    case v1::DTYPE_F32:
      return "F32";
    case v1::DTYPE_F16:
      return "F16";
    case v1::DTYPE_F8_E4M3:
      return "F8_E4M3";
    case v1::DTYPE_F8_E5M2:
      return "F8_E5M2";
    default:
      return "BF16";
  }
}

absl::StatusOr<Capture> Capture::Open(const std::string& path) {
  absl::StatusOr<std::shared_ptr<const SafetensorsFile>> file = SafetensorsFile::Open(path);
  if (!file.ok()) return file.status();
  Capture capture;
  capture.file_ = *std::move(file);
  absl::Status status = capture.ReadMetadata();
  if (status.ok()) status = capture.ReadTensors();
  if (!status.ok()) {
    return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
  }
  return capture;
}

absl::Status Capture::ReadMetadata() {
  const auto& metadata = file_->metadata();
  const auto count = [&](const char* key, uint32_t least, std::optional<uint32_t> fallback,
                         auto&& set) -> absl::Status {
    const auto it = metadata.find(key);
    if (it == metadata.end()) {
      if (!fallback.has_value()) {
        return absl::InvalidArgumentError(
            absl::StrCat("metadata '", key, "' is missing; this is no captured prefill"));
      }
      set(*fallback);
      return absl::OkStatus();
    }
    uint32_t value = 0;
    if (!absl::SimpleAtoi(it->second, &value) || value < least || value > kMaxCount) {
      return absl::InvalidArgumentError(absl::StrCat("metadata '", key, "' is '", it->second,
                                                     "', allowed are ", least, " to ", kMaxCount));
    }
    set(value);
    return absl::OkStatus();
  };
  v1::ModelGeometry& g = geometry_;
  absl::Status status = count("layers", 1, {}, [&](uint32_t v) { g.set_layer_count(v); });
  status.Update(count("query_heads", 1, {}, [&](uint32_t v) { g.set_query_head_count(v); }));
  status.Update(count("kv_heads", 1, {}, [&](uint32_t v) { g.set_kv_head_count(v); }));
  status.Update(count("head_dim", 1, {}, [&](uint32_t v) { g.set_key_dim(v); }));
  status.Update(count("value_dim", 1, g.key_dim(), [&](uint32_t v) { g.set_value_dim(v); }));
  status.Update(count("prompt_tokens", 1, {}, [&](uint32_t v) { prompt_tokens_ = v; }));
  status.Update(count("window_tokens", 0, 0, [&](uint32_t v) { window_tokens_ = v; }));
  if (!status.ok()) return status;
  if (g.query_head_count() % g.kv_head_count() != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("metadata 'query_heads' is ", g.query_head_count(),
                     ", a multiple of 'kv_heads' (", g.kv_head_count(), ") is needed"));
  }
  if (absl::Status shape = ReadShapeMetadata(); !shape.ok()) return shape;
  const auto layout = metadata.find("layout");
  if (layout == metadata.end() || layout->second == "head_token_dim") {
    layout_ = v1::LAYOUT_HEAD_TOKEN_DIM;
  } else if (layout->second == "token_head_dim") {
    layout_ = v1::LAYOUT_TOKEN_HEAD_DIM;
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("metadata 'layout' is '", layout->second,
                     "', allowed are head_token_dim and token_head_dim"));
  }
  return absl::OkStatus();
}

absl::Status Capture::ReadShapeMetadata() {
  const auto in_keys = metadata().find("values_in_keys");
  if (in_keys != metadata().end()) {
    if (in_keys->second != "true" && in_keys->second != "false") {
      return absl::InvalidArgumentError(absl::StrCat(
          "metadata 'values_in_keys' is '", in_keys->second, "', allowed are true and false"));
    }
    geometry_.set_values_in_keys(in_keys->second == "true");
  }
  if (geometry_.values_in_keys() && geometry_.value_dim() > geometry_.key_dim()) {
    return absl::InvalidArgumentError(
        absl::StrCat("metadata 'value_dim' is ", geometry_.value_dim(), ", at most 'head_dim' (",
                     geometry_.key_dim(), ") is allowed where values are a part of the keys"));
  }
  const auto scale = metadata().find("attention_scale");
  if (scale == metadata().end()) return absl::OkStatus();
  double value = 0;
  if (!absl::SimpleAtod(scale->second, &value) || !(value > 0) || !std::isfinite(value)) {
    return absl::InvalidArgumentError(absl::StrCat("metadata 'attention_scale' is '", scale->second,
                                                   "', a finite number above 0 is needed"));
  }
  attention_scale_ = value;
  return absl::OkStatus();
}

std::vector<int64_t> Capture::KvShape(int64_t tokens, int64_t dim) const {
  const int64_t heads = geometry_.kv_head_count();
  if (layout_ == v1::LAYOUT_HEAD_TOKEN_DIM) return {heads, tokens, dim};
  return {tokens, heads, dim};
}

absl::Status Capture::Check(const std::string& name, const std::string& dtype,
                            absl::Span<const int64_t> shape) const {
  const TensorInfo* info = file_->Find(name);
  if (info == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("tensor '", name, "' is missing; ", dtype, " ",
                                                   ShapeText(shape), " expected"));
  }
  if (info->dtype != dtype || absl::MakeConstSpan(info->shape) != shape) {
    return absl::InvalidArgumentError(absl::StrCat("tensor '", name, "' is ", info->dtype, " ",
                                                   ShapeText(info->shape), ", ", dtype, " ",
                                                   ShapeText(shape), " expected"));
  }
  return absl::OkStatus();
}

absl::Status Capture::ReadElementTypes() {
  const TensorInfo* keys = file_->Find(Name(0, "k"));
  if (keys == nullptr) return absl::InvalidArgumentError("tensor 'layer.0.k' is missing");
  dtype_name_ = keys->dtype;
  dtype_ = DTypeFromSafetensors(dtype_name_);
  if (dtype_ == v1::DTYPE_UNSPECIFIED) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor 'layer.0.k' is ", dtype_name_,
                     ", allowed are BF16, F16, F32, F8_E4M3 and F8_E5M2"));
  }
  query_dtype_ = dtype_;
  if (client::ElementBytes(dtype_) != 1) return absl::OkStatus();
  query_dtype_ = v1::DTYPE_BF16;
  for (const char* suffix : {"q_future", "q_window"}) {
    const TensorInfo* queries = file_->Find(Name(0, suffix));
    if (queries == nullptr) continue;
    query_dtype_ = DTypeFromSafetensors(queries->dtype);
    if (client::ElementBytes(query_dtype_) > 1) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor '", Name(0, suffix), "' is ", queries->dtype, ", allowed are BF16, F16 and F32"));
  }
  if (const TensorInfo* scale = file_->Find(Name(0, "k_scale"))) {
    const bool one = scale->shape == std::vector<int64_t>{1};
    kv_scales_ = one ? v1::KV_SCALES_PER_TENSOR : v1::KV_SCALES_PER_KV_HEAD;
  }
  return absl::OkStatus();
}

absl::Status Capture::ReadTensors() {
  if (absl::Status types = ReadElementTypes(); !types.ok()) return types;
  // The first layer says which tensors there are; the others must follow it.
  if (file_->Find(Name(0, "q_window")) != nullptr) {
    statistic_ = v1::STATISTIC_WINDOW_QUERIES;
    if (window_tokens_ == 0 || window_tokens_ > prompt_tokens_) {
      return absl::InvalidArgumentError(absl::StrCat("metadata 'window_tokens' is ", window_tokens_,
                                                     ", allowed are 1 to ", prompt_tokens_));
    }
    has_lse_ = file_->Find(Name(0, "lse")) != nullptr;
  } else if (const TensorInfo* saliency = file_->Find(Name(0, "saliency"))) {
    statistic_ =
        saliency->shape.size() == 1 ? v1::STATISTIC_SALIENCY : v1::STATISTIC_SALIENCY_PER_KV_HEAD;
  }
  if (file_->Find(Name(0, "column_sums")) != nullptr) {
    absl::Status sums = UseColumnSums(file_);
    if (!sums.ok()) return sums;
  }
  const TensorInfo* future = file_->Find(Name(0, "q_future"));
  if (future != nullptr) {
    if (future->shape.size() != 3 || future->shape[1] < 1 || future->shape[1] > kMaxCount) {
      return absl::InvalidArgumentError(absl::StrCat("tensor 'layer.0.q_future' is ",
                                                     ShapeText(future->shape),
                                                     ", [query_heads, M, head_dim] expected"));
    }
    future_tokens_ = static_cast<uint32_t>(future->shape[1]);
  }
  for (uint32_t layer = 0; layer < geometry_.layer_count(); ++layer) {
    absl::Status status = CheckLayer(layer);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Capture::SetStatistic(v1::Open* open) const {
  open->clear_statistic();
  open->clear_window_lse();
  const v1::Method& method = open->method();
  if (method.has_streaming_llm() || method.has_full()) return absl::OkStatus();
  if (method.has_h2o()) {
    if (column_sums_ == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat(path(),
                       ": the capture has no column_sums, the attention of all queries that h2o "
                       "needs; --column-sums names a file that has them"));
    }
    open->set_statistic(v1::STATISTIC_SALIENCY_PER_KV_HEAD);
    return absl::OkStatus();
  }
  if (statistic_ == v1::STATISTIC_NONE) {
    return absl::FailedPreconditionError(absl::StrCat(
        path(), ": the capture has neither q_window nor saliency, which the method needs"));
  }
  open->set_statistic(statistic_);
  open->set_window_lse(has_lse_);
  return absl::OkStatus();
}

absl::Status Capture::ReadColumnSums(const std::string& path) {
  absl::StatusOr<std::shared_ptr<const SafetensorsFile>> file = SafetensorsFile::Open(path);
  if (!file.ok()) return file.status();
  return UseColumnSums(*std::move(file));
}

absl::Status Capture::UseColumnSums(std::shared_ptr<const SafetensorsFile> file) {
  const std::vector<int64_t> shape = {geometry_.kv_head_count(), prompt_tokens_};
  for (uint32_t layer = 0; layer < geometry_.layer_count(); ++layer) {
    const std::string name = Name(layer, "column_sums");
    const TensorInfo* info = file->Find(name);
    if (info == nullptr || info->dtype != "F32" || info->shape != shape) {
      return absl::InvalidArgumentError(
          absl::StrCat(file->path(), ": tensor '", name, "' is ",
                       info == nullptr ? "missing" : info->dtype + " " + ShapeText(info->shape),
                       ", F32 ", ShapeText(shape), " expected"));
    }
  }
  column_sums_ = std::move(file);
  return absl::OkStatus();
}

absl::Status Capture::CheckLayer(uint32_t layer) const {
  const int64_t query_heads = geometry_.query_head_count();
  const int64_t kv_heads = geometry_.kv_head_count();
  const int64_t key_dim = geometry_.key_dim();
  const int64_t value_dim = geometry_.value_dim();
  const int64_t future = future_tokens_;
  absl::Status status = Check(Name(layer, "k"), dtype_name_, KvShape(prompt_tokens_, key_dim));
  const bool has_values = !geometry_.values_in_keys();
  const std::string query_dtype(SafetensorsName(query_dtype_));
  if (kv_scales_ != v1::KV_SCALES_NONE) {
    const int64_t scales = kv_scales_ == v1::KV_SCALES_PER_TENSOR ? 1 : kv_heads;
    status.Update(Check(Name(layer, "k_scale"), "F32", {scales}));
    if (has_values) status.Update(Check(Name(layer, "v_scale"), "F32", {scales}));
  }
  if (has_values) {
    status.Update(Check(Name(layer, "v"), dtype_name_, KvShape(prompt_tokens_, value_dim)));
  }
  if (statistic_ == v1::STATISTIC_WINDOW_QUERIES) {
    status.Update(
        Check(Name(layer, "q_window"), query_dtype, {query_heads, window_tokens_, key_dim}));
    if (has_lse_) status.Update(Check(Name(layer, "lse"), "F32", {query_heads, window_tokens_}));
  } else if (statistic_ == v1::STATISTIC_SALIENCY) {
    status.Update(Check(Name(layer, "saliency"), "F32", {prompt_tokens_}));
  } else if (statistic_ == v1::STATISTIC_SALIENCY_PER_KV_HEAD) {
    status.Update(Check(Name(layer, "saliency"), "F32", {kv_heads, prompt_tokens_}));
  }
  if (future > 0) {
    status.Update(Check(Name(layer, "q_future"), query_dtype, {query_heads, future, key_dim}));
    status.Update(Check(Name(layer, "k_future"), dtype_name_, {kv_heads, future, key_dim}));
    if (has_values) {
      status.Update(Check(Name(layer, "v_future"), dtype_name_, {kv_heads, future, value_dim}));
    }
  }
  return status;
}

uint64_t Capture::kv_bytes() const {
  const uint32_t value_dim = geometry_.values_in_keys() ? 0 : geometry_.value_dim();
  return client::ElementBytes(dtype_) * geometry_.layer_count() * geometry_.kv_head_count() *
         prompt_tokens_ * (geometry_.key_dim() + value_dim);
}

float Capture::Scale(uint32_t layer, v1::Tensor tensor, uint32_t head) const {
  if (kv_scales_ == v1::KV_SCALES_NONE) return 1;
  const bool values = tensor == v1::TENSOR_VALUES && !geometry_.values_in_keys();
  const absl::Span<const std::byte> scales = Data(layer, values ? "v_scale" : "k_scale");
  const size_t at = kv_scales_ == v1::KV_SCALES_PER_TENSOR ? 0 : head * sizeof(float);
  float scale = 0;
  std::memcpy(&scale, scales.data() + at, sizeof scale);
  return scale;
}

double Capture::attention_scale() const {
  return attention_scale_.value_or(1 / std::sqrt(static_cast<double>(geometry_.key_dim())));
}

v1::Open Capture::MakeOpen() const {
  v1::Open open;
  *open.mutable_geometry() = geometry_;
  open.set_prompt_tokens(prompt_tokens_);
  open.set_dtype(dtype_);
  open.set_layout(layout_);
  if (query_dtype_ != dtype_) open.set_query_dtype(query_dtype_);
  if (kv_scales_ != v1::KV_SCALES_NONE) open.set_kv_scales(kv_scales_);
  if (attention_scale_.has_value()) open.set_attention_scale(*attention_scale_);
  const auto model = metadata().find("model_id");
  if (model != metadata().end()) open.set_model_id(model->second);
  return open;
}

absl::Span<const std::byte> Capture::Data(uint32_t layer, const char* suffix) const {
  return file_->Data(*file_->Find(Name(layer, suffix)));
}

absl::StatusOr<client::LayerTensors> Capture::Layer(uint32_t layer,
                                                    const v1::Opened& opened) const {
  // Owns the file and what had to be copied.
  struct Owned {
    std::shared_ptr<const SafetensorsFile> file;
    std::shared_ptr<const SafetensorsFile> column_sums;
    std::vector<std::shared_ptr<std::vector<std::byte>>> copies;
  };
  auto owned = std::make_shared<Owned>();
  owned->file = file_;
  owned->column_sums = column_sums_;
  const uint32_t rows = opened.window_tokens();
  const auto window = [&](const char* suffix) -> absl::Span<const std::byte> {
    const absl::Span<const std::byte> all = Data(layer, suffix);
    if (rows == window_tokens_) return all;
    owned->copies.push_back(LastRows(all, geometry_.query_head_count(), window_tokens_, rows));
    return *owned->copies.back();
  };
  client::LayerTensors tensors;
  for (int tensor : opened.required_tensors()) {
    switch (tensor) {
      case v1::TENSOR_KEYS:
        tensors.keys = Data(layer, "k");
        break;
      case v1::TENSOR_VALUES:
        tensors.values = Data(layer, "v");
        break;
      case v1::TENSOR_KEY_SCALES:
        tensors.key_scales = Data(layer, "k_scale");
        break;
      case v1::TENSOR_VALUE_SCALES:
        tensors.value_scales = Data(layer, "v_scale");
        break;
      case v1::TENSOR_WINDOW_QUERIES:
      case v1::TENSOR_WINDOW_LSE:
        if (rows > window_tokens_) {
          return absl::InvalidArgumentError(absl::StrCat(
              path(), ": a window of ", rows, " tokens, the capture has ", window_tokens_));
        }
        if (tensor == v1::TENSOR_WINDOW_QUERIES) {
          tensors.window_queries = window("q_window");
        } else if (has_lse_) {
          tensors.window_lse = window("lse");
        }
        break;
      case v1::TENSOR_SALIENCY:
        if (opened.method().has_h2o() && column_sums_ != nullptr) {
          tensors.saliency = column_sums_->Data(*column_sums_->Find(Name(layer, "column_sums")));
          break;
        }
        if (file_->Find(Name(layer, "saliency")) == nullptr) {
          return absl::InvalidArgumentError(absl::StrCat(path(), ": the capture has no saliency"));
        }
        tensors.saliency = Data(layer, "saliency");
        break;
      default:
        return absl::UnimplementedError(absl::StrCat("the server asks for tensor ", tensor,
                                                     ", which this command does not know"));
    }
  }
  tensors.owner = owned;
  return tensors;
}

absl::StatusOr<client::LayerTensors> Capture::SkeletonLayer(
    uint32_t layer, const v1::Opened& opened, absl::Span<const int32_t> skeleton) const {
  absl::StatusOr<client::LayerTensors> full = Layer(layer, opened);
  if (!full.ok()) return full.status();
  if (!full->window_lse.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(
        path(), ": the capture's log-sum-exp is over all keys, not over the skeleton's"));
  }
  struct Owned {
    std::shared_ptr<const void> full;
    std::vector<std::vector<std::byte>> copies;
  };
  auto owned = std::make_shared<Owned>();
  owned->full = full->owner;
  const uint64_t heads = geometry_.kv_head_count();
  const uint64_t outer = layout_ == v1::LAYOUT_HEAD_TOKEN_DIM ? heads : 1;
  const auto gather = [&](absl::Span<const std::byte> data, uint64_t runs) {
    if (data.empty()) return data;
    owned->copies.push_back(Rows(data, runs, prompt_tokens_, skeleton));
    return absl::Span<const std::byte>(owned->copies.back());
  };
  full->keys = gather(full->keys, outer);
  full->values = gather(full->values, outer);
  full->saliency = gather(full->saliency,
                          statistic_ == v1::STATISTIC_SALIENCY_PER_KV_HEAD ? heads : uint64_t{1});
  full->positions = skeleton;
  full->owner = std::move(owned);
  return full;
}

FutureTensors Capture::Future(uint32_t layer) const {
  FutureTensors future = {Data(layer, "q_future"), Data(layer, "k_future"), {}};
  if (!geometry_.values_in_keys()) future.values = Data(layer, "v_future");
  return future;
}

}  // namespace structkv::cli
