// Everything about a prompt that is known before its first byte arrives, and the sizes that follow.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/tensor.h"
#include "service/engine/paged_layout.h"
#include "service/method/method_spec.h"
#include "service/method/rotary.h"

namespace structkv::engine {

struct ModelGeometry {
  int64_t layers = 0;
  int64_t query_heads = 0;
  int64_t kv_heads = 0;
  int64_t key_dim = 0;
  int64_t value_dim = 0;
  // A token's values are the first value_dim elements of its keys (MLA): nobody sends or keeps
  // them.
  bool values_in_keys = false;

  int64_t group() const { return query_heads / kv_heads; }
};

// What the worker sends for scoring.
enum class Statistic : uint8_t { kNone, kWindowQueries, kSaliency, kSaliencyPerKvHead };

// What the worker sends the kept rows of alone, once it is told which these are.
enum class Pull : uint8_t { kNone, kValues, kKeysAndValues };

// Factors that fp8 keys and values are to be multiplied by.
enum class KvScales : uint8_t { kNone, kPerTensor, kPerKvHead };

// Tensors that a worker sends for a layer.
enum class InputTensor : uint8_t {
  kKeys,
  kValues,
  kWindowQueries,
  kWindowLse,
  kSaliency,
  kPositions,  // the tokens of a layer of skeleton rows
  kKeyScales,
  kValueScales,
};
inline constexpr int kInputTensors = 8;

// Proto-style lower-case name: "keys", "values", "window_queries", "window_lse", "saliency",
// "positions", "key_scales", "value_scales".
std::string_view InputTensorName(InputTensor tensor);

// What a deployment allows. One prompt beyond a limit is refused.
struct PromptLimits {
  int64_t max_prompt_tokens = 1 << 20;
  int64_t max_layers = 512;
  int64_t max_heads = 1024;
  int64_t max_window = 64;
};

struct PromptSpec {
  ModelGeometry geometry;
  int64_t prompt_tokens = 0;
  DType dtype = DType::kBF16;
  // Of window queries. None: bf16 where keys are fp8, otherwise their type.
  std::optional<DType> query_dtype;
  KvScales kv_scales = KvScales::kNone;
  Layout layout = Layout::kHeadTokenDim;
  // Blocks that keys and values lie in. None: they are dense.
  std::optional<PagedLayout> paged;
  // Factor of the attention scores. None: 1 / sqrt(key_dim).
  std::optional<double> attention_scale;
  Statistic statistic = Statistic::kWindowQueries;
  bool window_lse = false;
  method::MethodSpec method;
  bool plan_only = false;  // positions alone
  bool held = false;       // kept rows stay here, so that pinning them would gain nothing
  Pull pull = Pull::kNone;
  bool return_saliency = false;
  bool return_centrality = false;
  // Decode ranks that kept rows are arranged for: each one's KV heads together, in the layout. 0 or
  // 1: all heads together.
  int64_t decode_shards = 0;
  // Set: kept keys are turned to consecutive positions, the last one to largest_kept_tokens() - 1.
  std::optional<method::RotarySpec> rotary;
  std::string model_id;

  // Element type of window queries.
  DType queries() const;
  // Tokens that keys and values of `tokens` in order take room for: whole blocks where paged.
  int64_t kv_slots(int64_t tokens) const;
  // Blocks of the largest layer's result; 0 where it is not paged, or a plan.
  int64_t kv_blocks() const;
  // Elements of a tensor of scales.
  int64_t scale_count() const;
  // Rows of the observation window: min(w, N); 0 for methods without one.
  int64_t window_rows() const;
  // Tokens that the layer keeps in every KV head; 0 in a layer without input.
  int64_t kept_tokens(int64_t layer) const;
  // The largest of the layers' counts.
  int64_t largest_kept_tokens() const;
  // The position at which a decoder goes on.
  int64_t next_position() const;
  // Tokens in the skeleton; 0 where the method has none.
  int64_t skeleton_tokens() const;
  bool per_kv_head() const;
  // Whether the pivot may be known before the last layer, so that layers past it may come as
  // skeleton rows.
  bool may_have_skeleton_layers() const;
  // Bytes of an input tensor of one full layer; 0: not part of it.
  // Whether the layer's tensors are part of the prompt: GemFilter looks at one layer alone.
  bool has_input(int64_t layer) const;
  // Bytes of an input tensor of one layer that has input; 0: not part of this prompt.
  int64_t InputBytes(InputTensor tensor) const;
  // The same of a layer of skeleton rows, which has positions too.
  int64_t SkeletonInputBytes(InputTensor tensor) const;
  std::vector<InputTensor> RequiredTensors() const;
  // Whether the kept rows of the tensor are pulled: then InputBytes() is 0, and so many bytes come
  // for `kept` tokens of each KV head.
  bool pulls(InputTensor tensor) const;
  // Bytes of the kept rows that come back of the layer that keeps most, of keys or values; whole
  // blocks where paged. 0: none do.
  int64_t KeptBytes(InputTensor tensor) const;
  int64_t PulledBytes(InputTensor tensor, int64_t kept) const;

 private:
  int64_t TensorBytes(InputTensor tensor, int64_t tokens, int64_t slots) const;
};

// INVALID_ARGUMENT, naming the field as the proto does, the value and the limit, where the spec is
// out of range, inconsistent or beyond the backend.
absl::Status ValidateSpec(const PromptSpec& spec, const PromptLimits& limits,
                          const BackendCapabilities& capabilities);

// Bytes that a prompt takes while it is compressed. None overflows for a valid spec.
struct MemoryPlan {
  // The tensors of one full layer as they arrive. Skeleton rows need no more: their positions are
  // compared with the skeleton and not kept.
  int64_t layer_input_bytes = 0;
  int64_t layer_kv_bytes = 0;      // of these, keys and values
  int64_t layer_output_bytes = 0;  // one layer's result
  int64_t layer_rows_bytes = 0;    // of these, kept keys and values
  int64_t state_bytes = 0;         // kept from layer to layer, until the end
  int64_t scratch_bytes = 0;       // while a layer is computed
};
MemoryPlan PlanMemory(const PromptSpec& spec, const Backend& backend);

// RESOURCE_EXHAUSTED, as Backend::CheckRoom, where no layer of the prompt can ever be scored.
absl::Status CheckRoom(const PromptSpec& spec, const Backend& backend, bool keys_on_device);

// 32 hexadecimal digits (XXH3-128) over method, parameters, geometry and model: the identity of a
// compacted cache.
std::string Fingerprint(const PromptSpec& spec);

}  // namespace structkv::engine
