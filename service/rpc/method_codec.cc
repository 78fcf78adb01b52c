#include "service/rpc/method_codec.h"

#include <utility>

#include "absl/status/status.h"
#include "service/rpc/open_decoder.h"

namespace structkv::rpc {
namespace {

absl::Status Invalid(absl::string_view kind, absl::string_view field, absl::string_view value,
                     absl::string_view allowed) {
  return absl::InvalidArgumentError(
      absl::StrCat("open.method.", kind, ".", field, " is ", value, "; ", allowed));
}

absl::Status DecodeBudget(const v1::Budget& budget, absl::string_view kind, absl::string_view field,
                          method::Budget* spec) {
  if (budget.has_ratio()) spec->ratio = budget.ratio();
  switch (budget.kind()) {
    case v1::BUDGET_KIND_UNSPECIFIED:
      return absl::OkStatus();
    case v1::BUDGET_KIND_INCLUDES_WINDOW:
      spec->kind = method::BudgetKind::kIncludesWindow;
      return absl::OkStatus();
    case v1::BUDGET_KIND_WINDOW_ON_TOP:
      spec->kind = method::BudgetKind::kWindowOnTop;
      return absl::OkStatus();
    case v1::BUDGET_KIND_KVPRESS:
      spec->kind = method::BudgetKind::kKvpress;
      return absl::OkStatus();
    default:
      return Invalid(
          kind, absl::StrCat(field, ".kind"), EnumText(budget.kind()),
          "allowed: BUDGET_KIND_INCLUDES_WINDOW, BUDGET_KIND_WINDOW_ON_TOP, BUDGET_KIND_KVPRESS");
  }
}

// The budget of a method without an observation window.
absl::Status DecodeWindowlessBudget(const v1::Budget& budget, absl::string_view kind,
                                    method::Budget* spec) {
  absl::Status status = DecodeBudget(budget, kind, "kv_budget", spec);
  if (status.ok() && spec->kind == method::BudgetKind::kWindowOnTop) {
    return Invalid(kind, "kv_budget.kind", EnumText(budget.kind()),
                   "allowed: BUDGET_KIND_INCLUDES_WINDOW, BUDGET_KIND_KVPRESS, or unset");
  }
  return status;
}

absl::Status DecodeGranularity(v1::Granularity granularity, absl::string_view kind,
                               method::MethodSpec* spec) {
  switch (granularity) {
    case v1::GRANULARITY_UNSPECIFIED:
      return absl::OkStatus();
    case v1::GRANULARITY_PER_LAYER:
      spec->granularity = method::Granularity::kPerLayer;
      return absl::OkStatus();
    case v1::GRANULARITY_PER_KV_HEAD:
      spec->granularity = method::Granularity::kPerKvHead;
      return absl::OkStatus();
    default:
      return Invalid(kind, "granularity", EnumText(granularity),
                     "allowed: GRANULARITY_PER_LAYER, GRANULARITY_PER_KV_HEAD");
  }
}

absl::Status DecodePooling(v1::Pooling pooling, absl::string_view kind, method::MethodSpec* spec) {
  switch (pooling) {
    case v1::POOLING_UNSPECIFIED:
      return absl::OkStatus();
    case v1::POOLING_NONE:
      spec->pooling = Pooling::kNone;
      return absl::OkStatus();
    case v1::POOLING_AVG:
      spec->pooling = Pooling::kAvg;
      return absl::OkStatus();
    case v1::POOLING_MAX:
      spec->pooling = Pooling::kMax;
      return absl::OkStatus();
    default:
      return Invalid(kind, "pooling", EnumText(pooling),
                     "allowed: POOLING_NONE, POOLING_AVG, POOLING_MAX");
  }
}

absl::Status DecodeWindowReduce(v1::WindowReduce reduce, absl::string_view kind,
                                method::MethodSpec* spec) {
  switch (reduce) {
    case v1::WINDOW_REDUCE_UNSPECIFIED:
      return absl::OkStatus();
    case v1::WINDOW_REDUCE_MEAN:
      spec->window_reduce = method::WindowReduce::kMean;
      return absl::OkStatus();
    case v1::WINDOW_REDUCE_SUM:
      spec->window_reduce = method::WindowReduce::kSum;
      return absl::OkStatus();
    case v1::WINDOW_REDUCE_MAX:
      spec->window_reduce = method::WindowReduce::kMax;
      return absl::OkStatus();
    default:
      return Invalid(kind, "window_reduce", EnumText(reduce),
                     "allowed: WINDOW_REDUCE_MEAN, WINDOW_REDUCE_SUM, WINDOW_REDUCE_MAX");
  }
}

absl::Status DecodeGroupReduce(v1::GroupReduce reduce, absl::string_view kind,
                               method::MethodSpec* spec) {
  switch (reduce) {
    case v1::GROUP_REDUCE_UNSPECIFIED:
      return absl::OkStatus();
    case v1::GROUP_REDUCE_SUM:
      spec->group_reduce = method::GroupReduce::kSum;
      return absl::OkStatus();
    case v1::GROUP_REDUCE_MEAN:
      spec->group_reduce = method::GroupReduce::kMean;
      return absl::OkStatus();
    case v1::GROUP_REDUCE_MAX:
      spec->group_reduce = method::GroupReduce::kMax;
      return absl::OkStatus();
    default:
      return Invalid(kind, "group_reduce", EnumText(reduce),
                     "allowed: GROUP_REDUCE_SUM, GROUP_REDUCE_MEAN, GROUP_REDUCE_MAX");
  }
}

// A layer that must be given.
absl::Status DecodeLayer(bool given, uint32_t layer, int64_t layers, absl::string_view kind,
                         absl::string_view field, int64_t* spec) {
  if (!given) return Invalid(kind, field, "not set", "the method needs it");
  if (layer >= layers) {
    return Invalid(kind, field, absl::StrCat(layer),
                   absl::StrCat("0 to ", layers - 1, " are allowed"));
  }
  *spec = layer;
  return absl::OkStatus();
}

// The parameters that the methods with an observation window share.
template <typename Kind>
absl::Status DecodeScoring(const Kind& method, absl::string_view kind, method::MethodSpec* spec) {
  absl::Status status = DecodeBudget(method.kv_budget(), kind, "kv_budget", &spec->kv_budget);
  if (status.ok()) status = DecodePooling(method.pooling(), kind, spec);
  if (status.ok()) status = DecodeWindowReduce(method.window_reduce(), kind, spec);
  if (status.ok()) status = DecodeGroupReduce(method.group_reduce(), kind, spec);
  if (!status.ok()) return status;
  if (method.has_window_tokens()) {
    spec->window = method.window_tokens();
    if (spec->window == 0) return Invalid(kind, "window_tokens", "0", "at least 1 is allowed");
  }
  if (method.has_pooling_kernel()) {
    if (spec->pooling == Pooling::kNone) {
      return Invalid(kind, "pooling_kernel", absl::StrCat(method.pooling_kernel()),
                     "it is allowed only with a pooling");
    }
    spec->pooling_kernel = method.pooling_kernel();
  }
  return absl::OkStatus();
}

// Parameters of ONLINE and PROFILED.
absl::Status DecodeOnline(const v1::Pivot& pivot, method::PivotSpec* spec) {
  const bool profiled = spec->mode == method::PivotMode::kProfiled;
  const bool online = profiled || spec->mode == method::PivotMode::kOnline;
  constexpr absl::string_view kOnline = "only PIVOT_MODE_ONLINE and PIVOT_MODE_PROFILED take it";
  if (pivot.has_patience() && !online) {
    return Invalid("structkv", "pivot.patience", absl::StrCat(pivot.patience()), kOnline);
  }
  if (pivot.has_deadline() && !online) {
    return Invalid("structkv", "pivot.deadline", absl::StrCat(pivot.deadline()), kOnline);
  }
  if (pivot.has_confirm_score() && !online) {
    return Invalid("structkv", "pivot.confirm_score", absl::StrCat(pivot.confirm_score()), kOnline);
  }
  if (pivot.has_profile_min_prompts() && !profiled) {
    return Invalid("structkv", "pivot.profile_min_prompts",
                   absl::StrCat(pivot.profile_min_prompts()), "only PIVOT_MODE_PROFILED takes it");
  }
  if (pivot.has_patience()) spec->patience = pivot.patience();
  if (pivot.has_deadline()) spec->deadline = pivot.deadline();
  if (pivot.has_confirm_score()) spec->confirm_score = pivot.confirm_score();
  if (pivot.has_profile_min_prompts()) spec->profile_min_prompts = pivot.profile_min_prompts();
  return absl::OkStatus();
}

absl::Status DecodePivot(const v1::Pivot& pivot, int64_t layers, method::PivotSpec* spec) {
  switch (pivot.mode()) {
    case v1::PIVOT_MODE_UNSPECIFIED:
    case v1::PIVOT_MODE_EXACT:
      spec->mode = method::PivotMode::kExact;
      break;
    case v1::PIVOT_MODE_FIXED:
      spec->mode = method::PivotMode::kFixed;
      break;
    case v1::PIVOT_MODE_ONLINE:
      spec->mode = method::PivotMode::kOnline;
      break;
    case v1::PIVOT_MODE_PROFILED:
      spec->mode = method::PivotMode::kProfiled;
      break;
    default:
      return Invalid("structkv", "pivot.mode", EnumText(pivot.mode()),
                     "allowed: PIVOT_MODE_EXACT, PIVOT_MODE_FIXED, PIVOT_MODE_ONLINE, "
                     "PIVOT_MODE_PROFILED");
  }
  const bool fixed = spec->mode == method::PivotMode::kFixed;
  if (fixed != pivot.has_fixed_layer()) {
    return Invalid("structkv", "pivot.fixed_layer",
                   pivot.has_fixed_layer() ? absl::StrCat(pivot.fixed_layer()) : "not set",
                   fixed ? "PIVOT_MODE_FIXED needs it" : "only PIVOT_MODE_FIXED takes it");
  }
  if (fixed) spec->fixed_layer = pivot.fixed_layer();
  if (fixed && spec->fixed_layer >= layers) {
    return Invalid("structkv", "pivot.fixed_layer", absl::StrCat(spec->fixed_layer),
                   absl::StrCat("0 to ", layers - 1, " are allowed"));
  }
  if (pivot.has_sparsity_ratio()) spec->sparsity_ratio = pivot.sparsity_ratio();
  if (pivot.has_entropy_weight()) spec->entropy_weight = pivot.entropy_weight();
  if (pivot.has_sparsity_weight()) spec->sparsity_weight = pivot.sparsity_weight();
  if (pivot.has_variance_weight()) spec->variance_weight = pivot.variance_weight();
  if (pivot.has_search_begin()) spec->search_begin = pivot.search_begin();
  if (pivot.has_search_end()) spec->search_end = pivot.search_end();
  return DecodeOnline(pivot, spec);
}

absl::StatusOr<method::MethodSpec> DecodeStructKv(const v1::StructKvMethod& method,
                                                  int64_t layers) {
  method::MethodSpec spec = method::MethodSpec::Defaults(method::Method::kStructKv);
  absl::Status status = DecodeGranularity(method.granularity(), "structkv", &spec);
  if (status.ok()) status = DecodeScoring(method, "structkv", &spec);
  if (status.ok()) {
    status = DecodeBudget(method.skeleton_budget(), "structkv", "skeleton_budget",
                          &spec.skeleton_budget);
  }
  if (status.ok()) status = DecodePivot(method.pivot(), layers, &spec.pivot);
  if (!status.ok()) return status;
  if (method.has_decay()) spec.decay = method.decay();
  return spec;
}

// SnapKV, and what the methods made after it share with it.
template <typename Kind>
absl::StatusOr<method::MethodSpec> DecodeSnapKv(const Kind& method, absl::string_view kind,
                                                method::Method which) {
  method::MethodSpec spec = method::MethodSpec::Defaults(which);
  absl::Status status = DecodeGranularity(method.granularity(), kind, &spec);
  if (status.ok()) status = DecodeScoring(method, kind, &spec);
  if (!status.ok()) return status;
  return spec;
}

absl::StatusOr<method::MethodSpec> DecodePyramidKv(const v1::PyramidKvMethod& method) {
  absl::StatusOr<method::MethodSpec> spec =
      DecodeSnapKv(method, "pyramidkv", method::Method::kPyramidKv);
  if (spec.ok() && method.has_beta()) spec->beta = method.beta();
  return spec;
}

absl::StatusOr<method::MethodSpec> DecodeFastKv(const v1::FastKvMethod& method, int64_t layers) {
  absl::StatusOr<method::MethodSpec> spec = DecodeSnapKv(method, "fastkv", method::Method::kFastKv);
  if (!spec.ok()) return spec;
  absl::Status status =
      DecodeBudget(method.skeleton_budget(), "fastkv", "skeleton_budget", &spec->skeleton_budget);
  if (status.ok()) {
    status = DecodeLayer(method.has_tsp_layer(), method.tsp_layer(), layers, "fastkv", "tsp_layer",
                         &spec->tsp_layer);
  }
  if (!status.ok()) return status;
  return spec;
}

absl::StatusOr<method::MethodSpec> DecodeGemFilter(const v1::GemFilterMethod& method,
                                                   int64_t layers) {
  method::MethodSpec spec = method::MethodSpec::Defaults(method::Method::kGemFilter);
  absl::Status status = DecodeScoring(method, "gemfilter", &spec);
  if (status.ok()) {
    status = DecodeLayer(method.has_filter_layer(), method.filter_layer(), layers, "gemfilter",
                         "filter_layer", &spec.filter_layer);
  }
  if (!status.ok()) return status;
  return spec;
}

absl::StatusOr<method::MethodSpec> DecodeH2o(const v1::H2oMethod& method, v1::Statistic statistic) {
  method::MethodSpec spec = method::MethodSpec::Defaults(method::Method::kH2o);
  // One vector cannot tell the heads apart.
  if (statistic == v1::STATISTIC_SALIENCY) spec.granularity = method::Granularity::kPerLayer;
  absl::Status status = DecodeWindowlessBudget(method.kv_budget(), "h2o", &spec.kv_budget);
  if (status.ok()) status = DecodeGranularity(method.granularity(), "h2o", &spec);
  if (!status.ok()) return status;
  if (method.has_recent_share()) spec.recent_share = method.recent_share();
  return spec;
}

absl::StatusOr<method::MethodSpec> DecodeStreamingLlm(const v1::StreamingLlmMethod& method) {
  method::MethodSpec spec = method::MethodSpec::Defaults(method::Method::kStreamingLlm);
  absl::Status status =
      DecodeWindowlessBudget(method.kv_budget(), "streaming_llm", &spec.kv_budget);
  if (!status.ok()) return status;
  if (method.has_sink_tokens()) spec.sink_tokens = method.sink_tokens();
  return spec;
}

v1::Budget EncodeBudget(const method::Budget& budget) {
  v1::Budget encoded;
  encoded.set_ratio(budget.ratio);
  switch (budget.kind) {
    case method::BudgetKind::kIncludesWindow:
      encoded.set_kind(v1::BUDGET_KIND_INCLUDES_WINDOW);
      break;
    case method::BudgetKind::kWindowOnTop:
      encoded.set_kind(v1::BUDGET_KIND_WINDOW_ON_TOP);
      break;
    case method::BudgetKind::kKvpress:
      encoded.set_kind(v1::BUDGET_KIND_KVPRESS);
      break;
  }
  return encoded;
}

v1::WindowReduce EncodeWindowReduce(method::WindowReduce reduce) {
  switch (reduce) {
    case method::WindowReduce::kMean:
      return v1::WINDOW_REDUCE_MEAN;
    case method::WindowReduce::kSum:
      return v1::WINDOW_REDUCE_SUM;
    case method::WindowReduce::kMax:
      return v1::WINDOW_REDUCE_MAX;
  }
  return v1::WINDOW_REDUCE_UNSPECIFIED;
}

v1::GroupReduce EncodeGroupReduce(method::GroupReduce reduce) {
  switch (reduce) {
    case method::GroupReduce::kSum:
      return v1::GROUP_REDUCE_SUM;
    case method::GroupReduce::kMean:
      return v1::GROUP_REDUCE_MEAN;
    case method::GroupReduce::kMax:
      return v1::GROUP_REDUCE_MAX;
  }
  return v1::GROUP_REDUCE_UNSPECIFIED;
}

v1::Granularity EncodeGranularity(method::Granularity granularity) {
  return granularity == method::Granularity::kPerKvHead ? v1::GRANULARITY_PER_KV_HEAD
                                                        : v1::GRANULARITY_PER_LAYER;
}

v1::Pooling EncodePooling(Pooling pooling) {
  switch (pooling) {
    case Pooling::kNone:
      return v1::POOLING_NONE;
    case Pooling::kAvg:
      return v1::POOLING_AVG;
    case Pooling::kMax:
      return v1::POOLING_MAX;
  }
  return v1::POOLING_UNSPECIFIED;
}

template <typename Kind>
void EncodeScoring(const method::MethodSpec& spec, Kind* method) {
  *method->mutable_kv_budget() = EncodeBudget(spec.kv_budget);
  method->set_window_tokens(static_cast<uint32_t>(spec.window));
  method->set_window_reduce(EncodeWindowReduce(spec.window_reduce));
  method->set_group_reduce(EncodeGroupReduce(spec.group_reduce));
  method->set_pooling(EncodePooling(spec.pooling));
  if (spec.pooling != Pooling::kNone) {
    method->set_pooling_kernel(static_cast<uint32_t>(spec.pooling_kernel));
  }
}

void EncodePivotSpec(const method::PivotSpec& spec, v1::Pivot* pivot) {
  const bool fixed = spec.mode == method::PivotMode::kFixed;
  pivot->set_mode(EncodePivotMode(spec.mode));
  const bool profiled = spec.mode == method::PivotMode::kProfiled;
  if (profiled || spec.mode == method::PivotMode::kOnline) {
    pivot->set_patience(static_cast<uint32_t>(spec.patience));
    pivot->set_deadline(spec.deadline_share());
    pivot->set_confirm_score(spec.confirm_score);
  }
  if (profiled) pivot->set_profile_min_prompts(static_cast<uint32_t>(spec.profile_min_prompts));
  if (fixed) pivot->set_fixed_layer(static_cast<uint32_t>(spec.fixed_layer));
  pivot->set_sparsity_ratio(spec.sparsity_ratio);
  pivot->set_entropy_weight(spec.entropy_weight);
  pivot->set_sparsity_weight(spec.sparsity_weight);
  pivot->set_variance_weight(spec.variance_weight);
  pivot->set_search_begin(spec.search_begin);
  pivot->set_search_end(spec.search_end);
}

}  // namespace

v1::PivotMode EncodePivotMode(method::PivotMode mode) {
  switch (mode) {
    case method::PivotMode::kExact:
      return v1::PIVOT_MODE_EXACT;
    case method::PivotMode::kFixed:
      return v1::PIVOT_MODE_FIXED;
    case method::PivotMode::kOnline:
      return v1::PIVOT_MODE_ONLINE;
    case method::PivotMode::kProfiled:
      return v1::PIVOT_MODE_PROFILED;
  }
  return v1::PIVOT_MODE_UNSPECIFIED;
}

absl::StatusOr<method::MethodSpec> DecodeMethod(const v1::Method& method, int64_t layers,
                                                v1::Statistic statistic) {
  switch (method.kind_case()) {
    case v1::Method::kSnapkv:
      return DecodeSnapKv(method.snapkv(), "snapkv", method::Method::kSnapKv);
    case v1::Method::kStreamingLlm:
      return DecodeStreamingLlm(method.streaming_llm());
    case v1::Method::kFull:
      return method::MethodSpec::Defaults(method::Method::kFull);
    case v1::Method::kPyramidkv:
      return DecodePyramidKv(method.pyramidkv());
    case v1::Method::kFastkv:
      return DecodeFastKv(method.fastkv(), layers);
    case v1::Method::kGemfilter:
      return DecodeGemFilter(method.gemfilter(), layers);
    case v1::Method::kH2O:
      return DecodeH2o(method.h2o(), statistic);
    case v1::Method::kStructkv:
    case v1::Method::KIND_NOT_SET:
      break;
  }
  return DecodeStructKv(method.structkv(), layers);
}

v1::Method EncodeMethod(const method::MethodSpec& spec) {
  v1::Method method;
  switch (spec.method) {
    case method::Method::kStructKv:
      EncodeScoring(spec, method.mutable_structkv());
      method.mutable_structkv()->set_granularity(EncodeGranularity(spec.granularity));
      method.mutable_structkv()->set_decay(spec.decay);
      *method.mutable_structkv()->mutable_skeleton_budget() = EncodeBudget(spec.skeleton_budget);
      EncodePivotSpec(spec.pivot, method.mutable_structkv()->mutable_pivot());
      break;
    case method::Method::kSnapKv:
      EncodeScoring(spec, method.mutable_snapkv());
      method.mutable_snapkv()->set_granularity(EncodeGranularity(spec.granularity));
      break;
    case method::Method::kStreamingLlm:
      *method.mutable_streaming_llm()->mutable_kv_budget() = EncodeBudget(spec.kv_budget);
      method.mutable_streaming_llm()->set_sink_tokens(static_cast<uint32_t>(spec.sink_tokens));
      break;
    case method::Method::kFull:
      method.mutable_full();
      break;
    case method::Method::kPyramidKv:
      EncodeScoring(spec, method.mutable_pyramidkv());
      method.mutable_pyramidkv()->set_granularity(EncodeGranularity(spec.granularity));
      method.mutable_pyramidkv()->set_beta(spec.beta);
      break;
    case method::Method::kFastKv:
      EncodeScoring(spec, method.mutable_fastkv());
      method.mutable_fastkv()->set_granularity(EncodeGranularity(spec.granularity));
      method.mutable_fastkv()->set_tsp_layer(static_cast<uint32_t>(spec.tsp_layer));
      *method.mutable_fastkv()->mutable_skeleton_budget() = EncodeBudget(spec.skeleton_budget);
      break;
    case method::Method::kGemFilter:
      EncodeScoring(spec, method.mutable_gemfilter());
      method.mutable_gemfilter()->set_filter_layer(static_cast<uint32_t>(spec.filter_layer));
      break;
    case method::Method::kH2o:
      *method.mutable_h2o()->mutable_kv_budget() = EncodeBudget(spec.kv_budget);
      method.mutable_h2o()->set_recent_share(spec.recent_share);
      method.mutable_h2o()->set_granularity(EncodeGranularity(spec.granularity));
      break;
  }
  return method;
}

}  // namespace structkv::rpc
