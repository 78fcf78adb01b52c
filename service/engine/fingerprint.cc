#include <xxhash.h>

#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "service/engine/prompt_spec.h"

namespace structkv::engine {
namespace {

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

absl::string_view PoolingName(Pooling pooling) {
  switch (pooling) {
    case Pooling::kNone:
      return "none";
    case Pooling::kAvg:
      return "avg";
    case Pooling::kMax:
      return "max";
  }
  return "?";
}

absl::string_view BudgetKindName(method::BudgetKind kind) {
  switch (kind) {
    case method::BudgetKind::kIncludesWindow:
      return "includes_window";
    case method::BudgetKind::kWindowOnTop:
      return "window_on_top";
    case method::BudgetKind::kKvpress:
      return "kvpress";
  }
  return "?";
}

void AddBudget(absl::string_view name, const method::Budget& budget, std::string& text) {
  absl::StrAppendFormat(&text, "%s=%.17g %s\n", name, budget.ratio, BudgetKindName(budget.kind));
}

void AddScoring(const method::MethodSpec& spec, std::string& text) {
  absl::StrAppendFormat(
      &text, "window=%d\ngranularity=%s\npooling=%s", spec.window,
      spec.granularity == method::Granularity::kPerLayer ? "per_layer" : "per_kv_head",
      PoolingName(spec.pooling));
  if (spec.pooling != Pooling::kNone) absl::StrAppend(&text, " ", spec.pooling_kernel);
  absl::StrAppend(&text, "\n");
  // Defaults have no line: they are what caches were stored under before there was a choice.
  if (spec.window_reduce != method::WindowReduce::kMean) {
    absl::StrAppend(&text, "window_reduce=",
                    spec.window_reduce == method::WindowReduce::kSum ? "sum" : "max", "\n");
  }
  if (spec.group_reduce != method::GroupReduce::kSum) {
    absl::StrAppend(&text, "group_reduce=",
                    spec.group_reduce == method::GroupReduce::kMean ? "mean" : "max", "\n");
  }
}

// What one method alone has.
void AddOwn(const method::MethodSpec& spec, std::string& text) {
  switch (spec.method) {
    case method::Method::kPyramidKv:
      absl::StrAppendFormat(&text, "beta=%.17g\n", spec.beta);
      break;
    case method::Method::kFastKv:
      AddBudget("skeleton_budget", spec.skeleton_budget, text);
      absl::StrAppend(&text, "tsp_layer=", spec.tsp_layer, "\n");
      break;
    case method::Method::kGemFilter:
      absl::StrAppend(&text, "filter_layer=", spec.filter_layer, "\n");
      break;
    case method::Method::kH2o:
      absl::StrAppendFormat(&text, "recent_share=%.17g\n", spec.recent_share);
      break;
    default:
      break;
  }
}

void AddPivot(const method::PivotSpec& pivot, std::string& text) {
  switch (pivot.mode) {
    case method::PivotMode::kFixed:
      absl::StrAppendFormat(&text, "pivot=fixed %d\n", pivot.fixed_layer);
      break;
    case method::PivotMode::kExact:
      absl::StrAppendFormat(&text, "pivot=exact %.17g %.17g\n", pivot.search_begin,
                            pivot.search_end);
      break;
    // What a profile has learned is no parameter.
    case method::PivotMode::kOnline:
    case method::PivotMode::kProfiled: {
      const bool online = pivot.mode == method::PivotMode::kOnline;
      absl::StrAppendFormat(&text, "pivot=%s %.17g %.17g %d %.17g %.17g\n",
                            online ? "online" : "profiled", pivot.search_begin, pivot.search_end,
                            pivot.patience, pivot.deadline_share(), pivot.confirm_score);
      if (!online) absl::StrAppendFormat(&text, "prompts=%d\n", pivot.profile_min_prompts);
      break;
    }
  }
  absl::StrAppendFormat(&text, "transition=%.17g %.17g %.17g %.17g\n", pivot.sparsity_ratio,
                        pivot.entropy_weight, pivot.sparsity_weight, pivot.variance_weight);
}

// What the keys and values are beyond their sizes. The plain case has no line: caches were stored
// before there was another.
void AddShape(const PromptSpec& spec, std::string& text) {
  if (spec.geometry.values_in_keys) absl::StrAppend(&text, "values_in_keys\n");
  // Where the blocks came from does not show in what comes back.
  if (spec.paged.has_value()) {
    absl::StrAppend(&text, "block_tokens=", spec.paged->block_tokens, "\n");
  }
  if (spec.kv_scales != KvScales::kNone) {
    absl::StrAppend(&text, "kv_scales=",
                    spec.kv_scales == KvScales::kPerTensor ? "per_tensor" : "per_kv_head", "\n");
  }
  // What the worker scored by itself has no scale here. The default may be written out as well.
  const double by_default = 1 / std::sqrt(static_cast<double>(spec.geometry.key_dim));
  const auto scale = static_cast<float>(spec.attention_scale.value_or(by_default));
  if (spec.statistic == Statistic::kWindowQueries && scale != static_cast<float>(by_default)) {
    absl::StrAppendFormat(&text, "attention_scale=%.9g\n", scale);
  }
}

// One line, only where keys are turned: what caches were stored under before stays the same.
void AddRotary(const method::RotarySpec& rotary, std::string& text) {
  absl::StrAppendFormat(&text, "rotary=%s %d %d %.17g",
                        rotary.pairing == RotaryPairing::kHalfSplit ? "half_split" : "interleaved",
                        rotary.offset, rotary.dim, rotary.theta);
  switch (rotary.type) {
    case method::RopeType::kDefault:
      absl::StrAppend(&text, " default");
      break;
    case method::RopeType::kLinear:
      absl::StrAppendFormat(&text, " linear %.17g", rotary.factor);
      break;
    case method::RopeType::kDynamic:
      absl::StrAppendFormat(&text, " dynamic %.17g %d", rotary.factor,
                            rotary.max_position_embeddings);
      break;
    case method::RopeType::kYarn:
      absl::StrAppendFormat(&text, " yarn %.17g %d %.17g %.17g %s", rotary.factor,
                            rotary.original_max_position_embeddings, rotary.beta_fast,
                            rotary.beta_slow, rotary.truncate ? "truncated" : "exact");
      break;
    case method::RopeType::kLlama3:
      absl::StrAppendFormat(&text, " llama3 %.17g %d %.17g %.17g", rotary.factor,
                            rotary.original_max_position_embeddings, rotary.low_freq_factor,
                            rotary.high_freq_factor);
      break;
  }
  absl::StrAppend(&text, "\n");
}

// One line a parameter, only those that the method has, so that an ignored one changes nothing.
std::string CanonicalText(const PromptSpec& spec) {
  const method::MethodSpec& method = spec.method;
  const ModelGeometry& geometry = spec.geometry;
  std::string text = absl::StrFormat(
      "structkv compacted cache 1\ngeometry=%d %d %d %d %d\ndtype=%s\nlayout=%s\nmethod=%s\n",
      geometry.layers, geometry.query_heads, geometry.kv_heads, geometry.key_dim,
      geometry.value_dim, View(DTypeName(spec.dtype)), View(LayoutName(spec.layout)),
      View(method::MethodName(method.method)));
  AddShape(spec, text);
  if (method.method != method::Method::kFull) AddBudget("kv_budget", method.kv_budget, text);
  if (method.needs_statistics()) AddScoring(method, text);
  if (method.method == method::Method::kStreamingLlm) {
    absl::StrAppendFormat(&text, "sinks=%d\n", method.sink_tokens);
  }
  AddOwn(method, text);
  if (method.has_centrality()) {
    absl::StrAppendFormat(&text, "decay=%.17g\n", method.decay);
    AddBudget("skeleton_budget", method.skeleton_budget, text);
    AddPivot(method.pivot, text);
  }
  if (spec.rotary.has_value()) AddRotary(*spec.rotary, text);
  // Last, because it may hold anything.
  absl::StrAppend(&text, "model=", spec.model_id);
  return text;
}

}  // namespace

std::string Fingerprint(const PromptSpec& spec) {
  const std::string text = CanonicalText(spec);
  const XXH128_hash_t hash = XXH3_128bits(text.data(), text.size());
  return absl::StrFormat("%016x%016x", hash.high64, hash.low64);
}

}  // namespace structkv::engine
