// A captured prefill: what a worker would send for one prompt, in a safetensors file.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/cli/safetensors.h"
#include "structkv/session.h"
#include "structkv/v1/compression.pb.h"

namespace structkv::cli {

// What came after the prompt in one layer, as the file holds it.
struct FutureTensors {
  absl::Span<const std::byte> queries;  // [query_heads, M, key_dim]
  absl::Span<const std::byte> keys;     // [kv_heads, M, key_dim]
  absl::Span<const std::byte> values;   // [kv_heads, M, value_dim]; empty: part of the keys
};

// Keys and values of F8_E4M3 and F8_E5M2 may have `layer.{i}.k_scale` and `.v_scale` ([1] or
// [kv_heads] float32, what elements are multiplied by); queries are then of a wider type.
//
// Tensors `layer.{i}.k`, `.v`, `.q_window` or `.saliency`, and optionally `.lse`, `.q_future`,
// `.k_future`, `.v_future`, `.column_sums` (the attention that each token draws from all queries of
// the prompt, [kv_heads, N] float32, which H2O needs); metadata `layers`, `query_heads`,
// `kv_heads`, `head_dim`, `prompt_tokens`, `window_tokens`, `layout` and optionally `value_dim`,
// `values_in_keys` ("true": there is no `.v`, `.v_scale` and `.v_future`), `attention_scale`,
// `model_id`. Copies share the file.
class Capture {
 public:
  // Validates everything: INVALID_ARGUMENT names the file, the tensor and its shape or the metadata
  // field.
  static absl::StatusOr<Capture> Open(const std::string& path);

  const std::string& path() const { return file_->path(); }
  const std::map<std::string, std::string>& metadata() const { return file_->metadata(); }
  const v1::ModelGeometry& geometry() const { return geometry_; }
  uint32_t prompt_tokens() const { return prompt_tokens_; }
  // Rows of `q_window` and `lse`; 0: the capture has none.
  uint32_t window_tokens() const { return window_tokens_; }
  uint32_t future_tokens() const { return future_tokens_; }
  v1::DType dtype() const { return dtype_; }
  v1::DType query_dtype() const { return query_dtype_; }
  // What an element of a layer's `tensor` (KEYS or VALUES) in a KV head is multiplied by.
  float Scale(uint32_t layer, v1::Tensor tensor, uint32_t head) const;
  const std::string& dtype_name() const { return dtype_name_; }
  v1::Layout layout() const { return layout_; }
  // What the capture has to score with.
  v1::Statistic statistic() const { return statistic_; }
  bool has_lse() const { return has_lse_; }
  // Factor of the attention scores.
  double attention_scale() const;
  // Bytes of all keys and values.
  uint64_t kv_bytes() const;

  // `Open` for this prompt: everything but the method, its statistic and the output.
  v1::Open MakeOpen() const;

  // Sets the statistic that `open`'s method takes of this capture. FAILED_PRECONDITION where the
  // capture does not have what the method needs.
  absl::Status SetStatistic(v1::Open* open) const;

  // Takes H2O's column sums from another file, with tensors `layer.{i}.column_sums`.
  absl::Status ReadColumnSums(const std::string& path);

  // The tensors that `opened` requires of a layer. A window shorter than the capture's takes its
  // last rows. INVALID_ARGUMENT where the capture does not have them.
  absl::StatusOr<client::LayerTensors> Layer(uint32_t layer, const v1::Opened& opened) const;

  // The rows of `skeleton` alone, with the skeleton as positions, for a layer of skeleton rows. It
  // lives as long as what is returned. FAILED_PRECONDITION where a log-sum-exp is required: the
  // capture's is over all keys.
  absl::StatusOr<client::LayerTensors> SkeletonLayer(uint32_t layer, const v1::Opened& opened,
                                                     absl::Span<const int32_t> skeleton) const;

  // Needs future_tokens() > 0.
  FutureTensors Future(uint32_t layer) const;

 private:
  Capture() = default;
  absl::Status ReadMetadata();
  absl::Status ReadShapeMetadata();
  absl::Status ReadTensors();
  absl::Status ReadElementTypes();
  absl::Status Check(const std::string& name, const std::string& dtype,
                     absl::Span<const int64_t> shape) const;
  absl::Status CheckLayer(uint32_t layer) const;
  absl::Status UseColumnSums(std::shared_ptr<const SafetensorsFile> file);
  absl::Span<const std::byte> Data(uint32_t layer, const char* suffix) const;
  std::vector<int64_t> KvShape(int64_t tokens, int64_t dim) const;

  std::shared_ptr<const SafetensorsFile> file_;
  std::shared_ptr<const SafetensorsFile> column_sums_;  // may be null
  v1::ModelGeometry geometry_;
  std::optional<double> attention_scale_;
  uint32_t prompt_tokens_ = 0;
  uint32_t window_tokens_ = 0;
  uint32_t future_tokens_ = 0;
  v1::DType dtype_ = v1::DTYPE_UNSPECIFIED;
  v1::DType query_dtype_ = v1::DTYPE_UNSPECIFIED;
  v1::KvScales kv_scales_ = v1::KV_SCALES_NONE;
  std::string dtype_name_;
  v1::Layout layout_ = v1::LAYOUT_UNSPECIFIED;
  v1::Statistic statistic_ = v1::STATISTIC_NONE;
  bool has_lse_ = false;
};

// "BF16" and so on; UNSPECIFIED for a dtype that the service does not know.
v1::DType DTypeFromSafetensors(std::string_view name);
std::string_view SafetensorsName(v1::DType dtype);

}  // namespace structkv::cli
