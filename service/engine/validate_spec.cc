#include <algorithm>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

#include "absl/numeric/int128.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "service/engine/prompt_spec.h"
#include "service/engine/validate_rotary.h"

namespace structkv::engine {
namespace {

using method::BudgetKind;
using method::Method;
using method::MethodSpec;
using method::PivotMode;
using method::PivotSpec;

constexpr size_t kMaxModelIdBytes = 256;
constexpr int64_t kMaxPoolingKernel = 63;
constexpr int64_t kMaxProfilePrompts = 1'000'000;
// Positions are int32.
constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
// A prompt's tensors, all layers together, stay far from what int64 holds.
constexpr int64_t kMaxPromptBytes = int64_t{1} << 56;

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

template <typename... Args>
absl::Status Invalid(absl::string_view field, const Args&... text) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", text...));
}

absl::Status CheckRange(absl::string_view field, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return Invalid(field, value, " is out of range [", least, ", ", most, "]");
}

absl::Status CheckShare(absl::string_view field, double value) {
  if (value >= 0 && value <= 1) return absl::OkStatus();
  return Invalid(field, value, " is out of range [0, 1]");
}

absl::Status CheckPositiveShare(absl::string_view field, double value) {
  if (value > 0 && value <= 1) return absl::OkStatus();
  return Invalid(field, value, " is out of range (0, 1]");
}

absl::Status CheckWeight(absl::string_view field, double value) {
  if (value >= 0 && std::isfinite(value)) return absl::OkStatus();
  return Invalid(field, value, " is not a finite number of 0 or more");
}

// Gives the first error.
absl::Status First(std::initializer_list<absl::Status> checks) {
  for (const absl::Status& check : checks) {
    if (!check.ok()) return check;
  }
  return absl::OkStatus();
}

absl::Status CheckDim(absl::string_view field, int64_t dim,
                      const BackendCapabilities& capabilities) {
  if (capabilities.SupportsDim(dim)) return absl::OkStatus();
  return Invalid(field, dim, " is not supported; allowed are multiples of ", capabilities.dim_step,
                 " in [", capabilities.min_dim, ", ", capabilities.max_dim, "]",
                 capabilities.extra_dims.empty() ? "" : " and ",
                 absl::StrJoin(capabilities.extra_dims, ", "));
}

absl::Status CheckGeometry(const ModelGeometry& geometry, const PromptLimits& limits,
                           const BackendCapabilities& capabilities) {
  absl::Status ranges = First({
      CheckRange("open.geometry.layer_count", geometry.layers, 1, limits.max_layers),
      CheckRange("open.geometry.query_head_count", geometry.query_heads, 1, limits.max_heads),
      CheckRange("open.geometry.kv_head_count", geometry.kv_heads, 1, limits.max_heads),
      CheckDim("open.geometry.key_dim", geometry.key_dim, capabilities),
      CheckDim("open.geometry.value_dim", geometry.value_dim, capabilities),
  });
  if (!ranges.ok()) return ranges;
  if (geometry.query_heads % geometry.kv_heads != 0) {
    return Invalid("open.geometry.query_head_count", geometry.query_heads,
                   " is not a multiple of kv_head_count, ", geometry.kv_heads);
  }
  if (geometry.values_in_keys && geometry.value_dim > geometry.key_dim) {
    return Invalid("open.geometry.value_dim", geometry.value_dim, " is above key_dim, ",
                   geometry.key_dim,
                   ", but values_in_keys says that values are a part of the keys");
  }
  return absl::OkStatus();
}

bool Supports(const BackendCapabilities& capabilities, DType dtype) {
  return std::find(capabilities.dtypes.begin(), capabilities.dtypes.end(), dtype) !=
         capabilities.dtypes.end();
}

absl::Status CheckDTypes(const PromptSpec& spec, const BackendCapabilities& capabilities) {
  const absl::string_view dtype = View(DTypeName(spec.dtype));
  if (!Supports(capabilities, spec.dtype)) {
    return Invalid("open.dtype", dtype, " is not supported by this backend");
  }
  const absl::string_view queries = View(DTypeName(spec.queries()));
  if (!Supports(capabilities, spec.queries())) {
    return Invalid("open.query_dtype", queries, " is not supported by this backend");
  }
  if (IsFp8(spec.dtype) ? IsFp8(spec.queries()) : spec.queries() != spec.dtype) {
    return Invalid("open.query_dtype", queries, " with keys of ", dtype, "; allowed is ",
                   IsFp8(spec.dtype) ? "f32, f16 or bf16" : dtype);
  }
  if (spec.kv_scales != KvScales::kNone && !IsFp8(spec.dtype)) {
    return Invalid("open.kv_scales",
                   spec.kv_scales == KvScales::kPerTensor ? "PER_TENSOR" : "PER_KV_HEAD",
                   " is for fp8 keys and values, but dtype is ", dtype);
  }
  return absl::OkStatus();
}

// The kernels take it as float32, where it must neither vanish nor overflow.
absl::Status CheckScale(const std::optional<double>& scale) {
  if (!scale.has_value()) return absl::OkStatus();
  if (*scale > 0 && std::isnormal(static_cast<float>(*scale))) return absl::OkStatus();
  return Invalid("open.attention_scale", *scale, " is not a finite number above 0 in float32");
}

absl::Status CheckOnline(const PivotSpec& pivot, const PromptLimits& limits) {
  absl::Status ranges = First({
      CheckRange("open.method.structkv.pivot.patience", pivot.patience, 1, limits.max_layers),
      CheckShare("open.method.structkv.pivot.deadline", pivot.deadline_share()),
      CheckShare("open.method.structkv.pivot.confirm_score", pivot.confirm_score),
      CheckRange("open.method.structkv.pivot.profile_min_prompts", pivot.profile_min_prompts, 1,
                 kMaxProfilePrompts),
  });
  if (!ranges.ok()) return ranges;
  if (pivot.deadline_share() < pivot.search_begin) {
    return Invalid("open.method.structkv.pivot.deadline", pivot.deadline_share(),
                   " is below search_begin, ", pivot.search_begin);
  }
  return absl::OkStatus();
}

absl::Status CheckPivot(const PivotSpec& pivot, int64_t layers, const PromptLimits& limits) {
  absl::Status ranges = First({
      CheckPositiveShare("open.method.structkv.pivot.sparsity_ratio", pivot.sparsity_ratio),
      CheckWeight("open.method.structkv.pivot.entropy_weight", pivot.entropy_weight),
      CheckWeight("open.method.structkv.pivot.sparsity_weight", pivot.sparsity_weight),
      CheckWeight("open.method.structkv.pivot.variance_weight", pivot.variance_weight),
      CheckShare("open.method.structkv.pivot.search_begin", pivot.search_begin),
      CheckShare("open.method.structkv.pivot.search_end", pivot.search_end),
  });
  if (!ranges.ok()) return ranges;
  if (pivot.mode == PivotMode::kFixed) {
    absl::Status fixed =
        CheckRange("open.method.structkv.pivot.fixed_layer", pivot.fixed_layer, 0, layers - 1);
    if (!fixed.ok()) return fixed;
  }
  if (pivot.entropy_weight == 0 && pivot.sparsity_weight == 0 && pivot.variance_weight == 0) {
    return Invalid("open.method.structkv.pivot.entropy_weight",
                   "0, and so are sparsity_weight and variance_weight; one must be above 0");
  }
  if (pivot.search_begin > pivot.search_end) {
    return Invalid("open.method.structkv.pivot.search_begin", pivot.search_begin,
                   " is above search_end, ", pivot.search_end);
  }
  if (pivot.mode != PivotMode::kOnline && pivot.mode != PivotMode::kProfiled) {
    return absl::OkStatus();
  }
  return CheckOnline(pivot, limits);
}

// Parameters that every scoring method has.
absl::Status CheckScoring(const std::string& prefix, const MethodSpec& method,
                          const PromptLimits& limits, const BackendCapabilities& capabilities) {
  const int64_t max_window = std::min(limits.max_window, capabilities.max_window);
  absl::Status window = CheckRange(prefix + ".window_tokens", method.window, 1, max_window);
  if (!window.ok()) return window;
  if (method.pooling == Pooling::kNone) return absl::OkStatus();
  absl::Status kernel =
      CheckRange(prefix + ".pooling_kernel", method.pooling_kernel, 1, kMaxPoolingKernel);
  if (!kernel.ok()) return kernel;
  if (method.pooling_kernel % 2 == 0) {
    return Invalid(prefix + ".pooling_kernel", method.pooling_kernel, " is not odd");
  }
  return absl::OkStatus();
}

// Methods without an observation window.
absl::Status CheckNoWindow(const std::string& prefix, const MethodSpec& method,
                           const PromptLimits& limits) {
  if (method.kv_budget.kind == BudgetKind::kWindowOnTop) {
    return Invalid(prefix + ".kv_budget.kind",
                   "WINDOW_ON_TOP is not allowed: the method has no observation window");
  }
  if (method.method == Method::kH2o) {
    return CheckShare(prefix + ".recent_share", method.recent_share);
  }
  return CheckRange(prefix + ".sink_tokens", method.sink_tokens, 0, limits.max_prompt_tokens);
}

// What one method alone has.
absl::Status CheckOwn(const std::string& prefix, const PromptSpec& spec,
                      const PromptLimits& limits) {
  const MethodSpec& method = spec.method;
  const int64_t last_layer = spec.geometry.layers - 1;
  switch (method.method) {
    case Method::kStructKv:
      return First({
          CheckShare(prefix + ".decay", method.decay),
          CheckPositiveShare(prefix + ".skeleton_budget.ratio", method.skeleton_budget.ratio),
          CheckPivot(method.pivot, spec.geometry.layers, limits),
      });
    case Method::kPyramidKv:
      if (method.beta >= 1 && std::isfinite(method.beta)) return absl::OkStatus();
      return Invalid(prefix + ".beta", method.beta, " is not a finite number of 1 or more");
    case Method::kFastKv:
      return First({
          CheckPositiveShare(prefix + ".skeleton_budget.ratio", method.skeleton_budget.ratio),
          CheckRange(prefix + ".tsp_layer", method.tsp_layer, 0, last_layer),
      });
    case Method::kGemFilter:
      if (!spec.plan_only) {
        return Invalid("open.output", "COMPACT, but gemfilter prefills again with the tokens it ",
                       "chose, so there is no cache to compact; it must be PLAN");
      }
      return CheckRange(prefix + ".filter_layer", method.filter_layer, 0, last_layer);
    default:
      return absl::OkStatus();
  }
}

absl::Status CheckMethod(const PromptSpec& spec, const PromptLimits& limits,
                         const BackendCapabilities& capabilities) {
  const MethodSpec& method = spec.method;
  const std::string prefix = absl::StrCat("open.method.", View(method::MethodName(method.method)));
  if (method.method == Method::kFull) return absl::OkStatus();
  absl::Status budget = CheckPositiveShare(prefix + ".kv_budget.ratio", method.kv_budget.ratio);
  if (!budget.ok()) return budget;

  if (method.method == Method::kStreamingLlm || method.method == Method::kH2o) {
    return CheckNoWindow(prefix, method, limits);
  }
  absl::Status scoring = CheckScoring(prefix, method, limits, capabilities);
  return scoring.ok() ? CheckOwn(prefix, spec, limits) : scoring;
}

// Statistics that one method or parameter cannot do with.
absl::Status CheckStatisticFits(const PromptSpec& spec) {
  const MethodSpec& method = spec.method;
  const bool queries = spec.statistic == Statistic::kWindowQueries;
  if (method.method == Method::kH2o && queries) {
    return Invalid("open.statistic", "WINDOW_QUERIES, but h2o needs the attention of all queries, ",
                   "which the worker alone has: SALIENCY or SALIENCY_PER_KV_HEAD");
  }
  if (method.method == Method::kFastKv && spec.statistic == Statistic::kSaliency &&
      spec.geometry.kv_heads > 1) {
    return Invalid("open.statistic", "SALIENCY, but fastkv smooths each of ",
                   spec.geometry.kv_heads, " KV heads for its skeleton; it needs ",
                   "SALIENCY_PER_KV_HEAD");
  }
  if (!method.needs_statistics() || queries) return absl::OkStatus();
  const auto reduced_already = [&](const char* field, const char* kind) {
    return Invalid(absl::StrCat("open.method.", View(method::MethodName(method.method)), field),
                   kind, " needs the statistic WINDOW_QUERIES: the worker's saliency is reduced ",
                   "already");
  };
  if (method.window_reduce != method::WindowReduce::kMean) {
    return reduced_already(".window_reduce",
                           method.window_reduce == method::WindowReduce::kMax ? "MAX" : "SUM");
  }
  if (method.group_reduce != method::GroupReduce::kSum) {
    return reduced_already(".group_reduce",
                           method.group_reduce == method::GroupReduce::kMax ? "MAX" : "MEAN");
  }
  return absl::OkStatus();
}

absl::Status CheckStatistic(const PromptSpec& spec) {
  const absl::string_view method = View(method::MethodName(spec.method.method));
  const bool needed = spec.method.needs_statistics();
  if (needed && spec.statistic == Statistic::kNone) {
    return Invalid("open.statistic", "NONE, but method ", method,
                   " needs WINDOW_QUERIES, SALIENCY or SALIENCY_PER_KV_HEAD");
  }
  if (!needed && spec.statistic != Statistic::kNone) {
    return Invalid("open.statistic", "method ", method, " needs none; it must be NONE or unset");
  }
  if (absl::Status fits = CheckStatisticFits(spec); !fits.ok()) return fits;
  // One vector for several heads cannot tell them apart.
  if (spec.statistic == Statistic::kSaliency && spec.per_kv_head() && spec.geometry.kv_heads > 1) {
    return Invalid("open.statistic", "SALIENCY has one value per token, but selection per KV head ",
                   "over ", spec.geometry.kv_heads, " heads needs SALIENCY_PER_KV_HEAD");
  }
  if (spec.window_lse && spec.statistic != Statistic::kWindowQueries) {
    return Invalid("open.window_lse", "true is allowed with the statistic WINDOW_QUERIES alone");
  }
  if (spec.return_saliency && !needed) {
    return Invalid("open.return_saliency", "true, but method ", method, " has no saliency");
  }
  if (spec.return_centrality && !spec.method.has_centrality()) {
    return Invalid("open.return_centrality", "true, but method ", method, " has no centrality");
  }
  return absl::OkStatus();
}

absl::Status CheckPull(const PromptSpec& spec) {
  if (spec.pull == Pull::kNone) return absl::OkStatus();
  const char* pull = spec.pull == Pull::kValues ? "VALUES" : "KEYS_AND_VALUES";
  if (spec.plan_only) {
    return Invalid("open.pull", pull, ", but the output PLAN has no rows; it must be NONE");
  }
  if (!spec.method.needs_statistics()) {
    return Invalid("open.pull", pull, ", but method ", View(method::MethodName(spec.method.method)),
                   " keeps rows that are known from the start; it must be NONE");
  }
  if (spec.decode_shards > 1) {
    return Invalid("open.pull", pull, ", but shard_group.decode_shard_count is ",
                   spec.decode_shards, ", and pulled rows are not rearranged; it must be NONE");
  }
  if (spec.geometry.values_in_keys) {
    return Invalid("open.pull", pull,
                   ", but values_in_keys says that values are a part of the keys; ",
                   "it must be NONE");
  }
  if (spec.paged.has_value()) {
    return Invalid("open.pull", pull, ", but keys and values are paged; it must be NONE");
  }
  if (spec.pull == Pull::kKeysAndValues && spec.statistic == Statistic::kWindowQueries) {
    return Invalid("open.pull", pull, ", but the statistic WINDOW_QUERIES is scored against all ",
                   "keys; NONE and VALUES are allowed");
  }
  return absl::OkStatus();
}

// The factors are in range each; their product need not be.
absl::Status CheckSize(const PromptSpec& spec) {
  const ModelGeometry& geometry = spec.geometry;
  const absl::uint128 vectors = absl::uint128(geometry.kv_heads) * spec.prompt_tokens;
  const absl::uint128 element = DTypeSize(spec.dtype);
  const absl::uint128 slots =
      spec.paged.has_value() ? absl::uint128(spec.paged->block_count) * spec.paged->block_tokens
                             : absl::uint128(spec.prompt_tokens);
  absl::uint128 layer =
      slots * geometry.kv_heads * (geometry.key_dim + geometry.value_dim) * element;
  layer += vectors * (2 * sizeof(float) + sizeof(int32_t));
  layer += absl::uint128(geometry.query_heads) * spec.window_rows() *
           (geometry.key_dim * absl::uint128(DTypeSize(spec.queries())) + sizeof(float));
  const absl::uint128 limit = kMaxPromptBytes;
  if (layer <= limit && layer * geometry.layers <= limit) return absl::OkStatus();
  return Invalid("open.geometry", geometry.layers, " layers of ", geometry.kv_heads,
                 " KV heads and ", spec.prompt_tokens, " tokens exceed ", kMaxPromptBytes,
                 " bytes");
}

}  // namespace

absl::Status ValidateSpec(const PromptSpec& spec, const PromptLimits& limits,
                          const BackendCapabilities& capabilities) {
  absl::Status geometry = CheckGeometry(spec.geometry, limits, capabilities);
  if (!geometry.ok()) return geometry;
  absl::Status tokens = CheckRange("open.prompt_tokens", spec.prompt_tokens, 1,
                                   std::min(limits.max_prompt_tokens, kMaxTokens));
  if (!tokens.ok()) return tokens;
  if (absl::Status dtypes = CheckDTypes(spec, capabilities); !dtypes.ok()) return dtypes;
  if (std::find(capabilities.layouts.begin(), capabilities.layouts.end(), spec.layout) ==
      capabilities.layouts.end()) {
    return Invalid("open.layout", View(LayoutName(spec.layout)),
                   " is not supported by this backend");
  }
  if (spec.paged.has_value()) {
    if (!capabilities.paged) return Invalid("open.paged", "is not supported by this backend");
    absl::Status paged = CheckPagedLayout(*spec.paged, spec.prompt_tokens);
    if (!paged.ok()) return paged;
  }
  if (absl::Status scale = CheckScale(spec.attention_scale); !scale.ok()) return scale;
  absl::Status method = CheckMethod(spec, limits, capabilities);
  if (!method.ok()) return method;
  absl::Status statistic = CheckStatistic(spec);
  if (!statistic.ok()) return statistic;
  const int64_t kv_heads = spec.geometry.kv_heads;
  if (spec.decode_shards > 1 && kv_heads % spec.decode_shards != 0 &&
      spec.decode_shards % kv_heads != 0) {
    return Invalid("open.shard_group.decode_shard_count", spec.decode_shards,
                   " neither divides the ", kv_heads, " KV heads nor is a multiple of them");
  }
  if (absl::Status pull = CheckPull(spec); !pull.ok()) return pull;
  if (spec.model_id.size() > kMaxModelIdBytes) {
    return Invalid("open.model_id", spec.model_id.size(), " bytes; at most ", kMaxModelIdBytes,
                   " are allowed");
  }
  if (spec.model_id.empty() && spec.method.has_skeleton() &&
      spec.method.pivot.mode == PivotMode::kProfiled) {
    return Invalid("open.model_id", "is empty; PIVOT_MODE_PROFILED needs the model's name");
  }
  if (absl::Status rotary = ValidateRotary(spec); !rotary.ok()) return rotary;
  return CheckSize(spec);
}

}  // namespace structkv::engine
