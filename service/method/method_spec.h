// What a prompt's compression is asked to do: the method and its parameters, independent of the
// wire.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "kernels/backend.h"

namespace structkv::method {

enum class Method : uint8_t {
  kStructKv,
  kSnapKv,
  kStreamingLlm,
  kFull,
  kPyramidKv,
  kFastKv,
  kGemFilter,
  kH2o,
};

// Lower-case name, as in the proto's `Method.kind`: "structkv", "snapkv", "streaming_llm", "full",
// "pyramidkv", "fastkv", "gemfilter", "h2o".
std::string_view MethodName(Method method);

enum class Granularity : uint8_t { kPerLayer, kPerKvHead };

// How the observation window counts in a budget (docs/method.md, section 4).
enum class BudgetKind : uint8_t { kIncludesWindow, kWindowOnTop, kKvpress };

// How the attention of the window's rows becomes a query head's score, and how the scores of a KV
// head's query heads become one (docs/method.md, section 4). The rows come first.
enum class WindowReduce : uint8_t { kMean, kSum, kMax };
enum class GroupReduce : uint8_t { kSum, kMean, kMax };

struct Budget {
  double ratio = 0.10;  // share of the prompt's tokens, (0, 1]
  BudgetKind kind = BudgetKind::kIncludesWindow;
};

enum class PivotMode : uint8_t { kExact, kFixed, kOnline, kProfiled };

// Dynamic pivot detection (docs/method.md, section 3).
struct PivotSpec {
  PivotMode mode = PivotMode::kExact;
  int64_t fixed_layer = 0;      // kFixed alone, 0 .. layers - 1
  double sparsity_ratio = 0.1;  // f: share of the tokens whose mass is the sparsity, (0, 1]
  double entropy_weight = 0.2;  // weights of the normalised gradients; >= 0, not all 0
  double sparsity_weight = 0.3;
  double variance_weight = 0.5;
  double search_begin = 0.25;  // the transition layer lies in [ceil(begin L), floor(end L)]
  double search_end = 0.75;
  int64_t patience = 2;            // kOnline, kProfiled: layers that must not beat the best; >= 1
  std::optional<double> deadline;  // share of the depth at which kOnline answers; unset: search_end
  // kOnline: T that the best layer needs to be confirmed before the deadline, as a share of the
  // highest that there can be, the sum of the weights; [0, 1].
  double confirm_score = 0.5;
  int64_t profile_min_prompts = 8;  // kProfiled: prompts that a profile must rest on; >= 1
  // kProfiled: what the model's profile says, looked up when the prompt opens. Unset: too few
  // prompts were seen, and the pivot is found as kOnline does.
  std::optional<int64_t> profiled_layer;  // 0 .. layers - 1
  int64_t profiled_prompts = 0;           // prompts that were seen

  double deadline_share() const { return deadline.value_or(search_end); }
  // The pivot layer where it is known before any data arrive.
  std::optional<int64_t> given_layer() const {
    if (mode == PivotMode::kFixed) return fixed_layer;
    return mode == PivotMode::kProfiled ? profiled_layer : std::nullopt;
  }
};

// A method with every parameter in force. Parameters that a method does not have are ignored.
struct MethodSpec {
  Method method = Method::kStructKv;
  Budget kv_budget;
  int64_t window = 8;  // observation window w, tokens; 0 for methods without statistics
  Granularity granularity = Granularity::kPerLayer;
  Pooling pooling = Pooling::kNone;
  int64_t pooling_kernel = 5;  // odd
  int64_t sink_tokens = 4;     // StreamingLLM
  double decay = 0.9;          // lambda of the centrality, [0, 1]
  Budget skeleton_budget = {.ratio = 0.20};
  PivotSpec pivot;
  WindowReduce window_reduce = WindowReduce::kMean;
  GroupReduce group_reduce = GroupReduce::kSum;
  double beta = 20;           // PyramidKV: how many times the mean budget is the last layer's, >= 1
  int64_t tsp_layer = 0;      // FastKV: the layer whose scores choose the skeleton
  int64_t filter_layer = 0;   // GemFilter: the layer whose scores choose the tokens
  double recent_share = 0.5;  // H2O: share of the budget for the latest tokens, [0, 1]

  // The method's published defaults (docs/method.md, section 5).
  static MethodSpec Defaults(Method method);

  // Whether the method scores tokens, so that statistics must come with every layer.
  bool needs_statistics() const {
    return method != Method::kStreamingLlm && method != Method::kFull;
  }
  // Whether the method has centrality and looks for a pivot.
  bool has_centrality() const { return method == Method::kStructKv; }
  // The layer whose scores alone choose the skeleton, of methods that have such a layer.
  std::optional<int64_t> skeleton_layer() const {
    if (method == Method::kFastKv) return tsp_layer;
    if (method == Method::kGemFilter) return filter_layer;
    return std::nullopt;
  }
  bool has_skeleton() const { return has_centrality() || skeleton_layer().has_value(); }
};

}  // namespace structkv::method
