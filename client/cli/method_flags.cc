#include "client/cli/method_flags.h"

#include <charconv>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/message.h"

namespace structkv::cli {
namespace {

constexpr char kPivotGroup[] = "Pivot (structkv)";
constexpr char kMethodGroup[] = "Method";

v1::BudgetKind ParseBudgetKind(const std::string& text) {
  if (text == "kvpress") return v1::BUDGET_KIND_KVPRESS;
  return text == "window-on-top" ? v1::BUDGET_KIND_WINDOW_ON_TOP : v1::BUDGET_KIND_INCLUDES_WINDOW;
}

v1::Granularity ParseGranularity(const std::string& text) {
  return text == "per-kv-head" ? v1::GRANULARITY_PER_KV_HEAD : v1::GRANULARITY_PER_LAYER;
}

v1::Pooling ParsePooling(const std::string& text) {
  if (text == "avg") return v1::POOLING_AVG;
  return text == "max" ? v1::POOLING_MAX : v1::POOLING_NONE;
}

v1::PivotMode ParsePivotMode(const std::string& text) {
  if (text == "fixed") return v1::PIVOT_MODE_FIXED;
  if (text == "online") return v1::PIVOT_MODE_ONLINE;
  return text == "profiled" ? v1::PIVOT_MODE_PROFILED : v1::PIVOT_MODE_EXACT;
}

v1::WindowReduce ParseWindowReduce(const std::string& text) {
  if (text == "sum") return v1::WINDOW_REDUCE_SUM;
  return text == "max" ? v1::WINDOW_REDUCE_MAX : v1::WINDOW_REDUCE_MEAN;
}

v1::GroupReduce ParseGroupReduce(const std::string& text) {
  if (text == "mean") return v1::GROUP_REDUCE_MEAN;
  return text == "max" ? v1::GROUP_REDUCE_MAX : v1::GROUP_REDUCE_SUM;
}

// The flags that were given and no method parameter has taken.
class Remaining {
 public:
  template <typename T>
  void Add(const char* flag, const std::optional<T>& value) {
    if (value.has_value()) given_.emplace(flag, true);
  }
  template <typename T, typename Set>
  void Take(const char* flag, const std::optional<T>& value, Set set) {
    if (!value.has_value()) return;
    set(*value);
    given_.erase(flag);
  }
  absl::Status Check(const std::string& method) const {
    if (given_.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(given_.begin()->first, " is no parameter of the method ", method));
  }

 private:
  std::map<std::string, bool> given_;
};

template <typename Kind>
void TakeBudget(const MethodFlags& flags, Remaining* rest, Kind* kind) {
  rest->Take("--kv-budget", flags.kv_budget,
             [&](double v) { kind->mutable_kv_budget()->set_ratio(v); });
  rest->Take("--budget-kind", flags.budget_kind, [&](const std::string& v) {
    kind->mutable_kv_budget()->set_kind(ParseBudgetKind(v));
  });
}

template <typename Kind>
void TakeGranularity(const MethodFlags& flags, Remaining* rest, Kind* kind) {
  rest->Take("--granularity", flags.granularity,
             [&](const std::string& v) { kind->set_granularity(ParseGranularity(v)); });
}

template <typename Kind>
void TakeSkeletonBudget(const MethodFlags& flags, Remaining* rest, Kind* kind) {
  rest->Take("--skeleton-budget", flags.skeleton_budget,
             [&](double v) { kind->mutable_skeleton_budget()->set_ratio(v); });
  rest->Take("--skeleton-budget-kind", flags.skeleton_budget_kind, [&](const std::string& v) {
    kind->mutable_skeleton_budget()->set_kind(ParseBudgetKind(v));
  });
}

// Parameters that the methods with an observation window share.
template <typename Kind>
void TakeScoring(const MethodFlags& flags, Remaining* rest, Kind* kind) {
  TakeBudget(flags, rest, kind);
  rest->Take("--window", flags.window, [&](uint32_t v) { kind->set_window_tokens(v); });
  rest->Take("--window-reduce", flags.window_reduce,
             [&](const std::string& v) { kind->set_window_reduce(ParseWindowReduce(v)); });
  rest->Take("--group-reduce", flags.group_reduce,
             [&](const std::string& v) { kind->set_group_reduce(ParseGroupReduce(v)); });
  rest->Take("--pooling", flags.pooling,
             [&](const std::string& v) { kind->set_pooling(ParsePooling(v)); });
  rest->Take("--pooling-kernel", flags.pooling_kernel,
             [&](uint32_t v) { kind->set_pooling_kernel(v); });
}

void TakeStructKv(const MethodFlags& flags, Remaining* rest, v1::StructKvMethod* kind) {
  TakeScoring(flags, rest, kind);
  TakeGranularity(flags, rest, kind);
  rest->Take("--decay", flags.decay, [&](double v) { kind->set_decay(v); });
  TakeSkeletonBudget(flags, rest, kind);
  rest->Take("--pivot", flags.pivot,
             [&](const std::string& v) { kind->mutable_pivot()->set_mode(ParsePivotMode(v)); });
  rest->Take("--pivot-layer", flags.pivot_layer,
             [&](uint32_t v) { kind->mutable_pivot()->set_fixed_layer(v); });
  rest->Take("--sparsity-ratio", flags.sparsity_ratio,
             [&](double v) { kind->mutable_pivot()->set_sparsity_ratio(v); });
  rest->Take("--pivot-weights", flags.pivot_weights, [&](const std::vector<double>& v) {
    kind->mutable_pivot()->set_entropy_weight(v[0]);
    kind->mutable_pivot()->set_sparsity_weight(v[1]);
    kind->mutable_pivot()->set_variance_weight(v[2]);
  });
  rest->Take("--pivot-search", flags.pivot_search, [&](const std::vector<double>& v) {
    kind->mutable_pivot()->set_search_begin(v[0]);
    kind->mutable_pivot()->set_search_end(v[1]);
  });
  rest->Take("--pivot-patience", flags.pivot_patience,
             [&](uint32_t v) { kind->mutable_pivot()->set_patience(v); });
  rest->Take("--pivot-deadline", flags.pivot_deadline,
             [&](double v) { kind->mutable_pivot()->set_deadline(v); });
  rest->Take("--pivot-score", flags.pivot_score,
             [&](double v) { kind->mutable_pivot()->set_confirm_score(v); });
  rest->Take("--profile-prompts", flags.profile_prompts,
             [&](uint32_t v) { kind->mutable_pivot()->set_profile_min_prompts(v); });
}

void TakePyramidKv(const MethodFlags& flags, Remaining* rest, v1::PyramidKvMethod* kind) {
  TakeScoring(flags, rest, kind);
  TakeGranularity(flags, rest, kind);
  rest->Take("--beta", flags.beta, [&](double v) { kind->set_beta(v); });
}

void TakeFastKv(const MethodFlags& flags, Remaining* rest, v1::FastKvMethod* kind) {
  TakeScoring(flags, rest, kind);
  TakeGranularity(flags, rest, kind);
  TakeSkeletonBudget(flags, rest, kind);
  rest->Take("--tsp-layer", flags.tsp_layer, [&](uint32_t v) { kind->set_tsp_layer(v); });
}

void TakeGemFilter(const MethodFlags& flags, Remaining* rest, v1::GemFilterMethod* kind) {
  TakeScoring(flags, rest, kind);
  rest->Take("--filter-layer", flags.filter_layer, [&](uint32_t v) { kind->set_filter_layer(v); });
}

void TakeH2o(const MethodFlags& flags, Remaining* rest, v1::H2oMethod* kind) {
  TakeBudget(flags, rest, kind);
  TakeGranularity(flags, rest, kind);
  rest->Take("--recent-share", flags.recent_share, [&](double v) { kind->set_recent_share(v); });
}

// "GRANULARITY_PER_LAYER" of enum Granularity -> "per_layer".
std::string EnumText(const google::protobuf::EnumValueDescriptor& value) {
  std::string prefix;
  for (char c : value.type()->name()) {
    if (absl::ascii_isupper(c) && !prefix.empty()) prefix.push_back('_');
    prefix.push_back(absl::ascii_toupper(c));
  }
  prefix.push_back('_');
  return absl::AsciiStrToLower(absl::StripPrefix(value.name(), prefix));
}

}  // namespace

void Flatten(const google::protobuf::Message& message, const std::string& prefix,
             std::map<std::string, std::string>* out) {
  using google::protobuf::FieldDescriptor;
  const google::protobuf::Reflection& reflection = *message.GetReflection();
  std::vector<const FieldDescriptor*> fields;
  reflection.ListFields(message, &fields);
  for (const FieldDescriptor* field : fields) {
    const std::string name = absl::StrCat(prefix, ".", field->name());
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_MESSAGE:
        Flatten(reflection.GetMessage(message, field), name, out);
        break;
      case FieldDescriptor::CPPTYPE_ENUM:
        (*out)[name] = EnumText(*reflection.GetEnum(message, field));
        break;
      case FieldDescriptor::CPPTYPE_DOUBLE:
        (*out)[name] = NumberText(reflection.GetDouble(message, field));
        break;
      case FieldDescriptor::CPPTYPE_UINT32:
        (*out)[name] = absl::StrCat(reflection.GetUInt32(message, field));
        break;
      case FieldDescriptor::CPPTYPE_BOOL:
        (*out)[name] = reflection.GetBool(message, field) ? "true" : "false";
        break;
      default:
        break;  // no parameter has another type
    }
  }
}

const std::vector<std::string>& MethodNames() {
  static const auto& names = *new std::vector<std::string>{
      "structkv", "snapkv", "pyramidkv", "fastkv", "gemfilter", "h2o", "streaming_llm", "full"};
  return names;
}

void AddMethodFlags(CLI::App* app, MethodFlags* f) {
  const CLI::IsMember kinds({"includes-window", "window-on-top", "kvpress"});
  app->add_option("--method", f->method, absl::StrJoin(MethodNames(), ", "))
      ->check(CLI::IsMember(MethodNames()))
      ->capture_default_str()
      ->group(kMethodGroup);
  app->add_option("--kv-budget", f->kv_budget, "Share of the tokens that each layer keeps (0.10)")
      ->group(kMethodGroup);
  app->add_option("--budget-kind", f->budget_kind,
                  "Whether the window counts: includes-window (default), window-on-top, or kvpress "
                  "to count as that package does")
      ->check(kinds)
      ->group(kMethodGroup);
  app->add_option("--window", f->window,
                  "Observation window in tokens (structkv and fastkv 8, snapkv and pyramidkv 32, "
                  "gemfilter 1)")
      ->group(kMethodGroup);
  app->add_option("--granularity", f->granularity,
                  "per-layer (structkv's default) or per-kv-head (the others')")
      ->check(CLI::IsMember({"per-layer", "per-kv-head"}))
      ->group(kMethodGroup);
  app->add_option("--pooling", f->pooling,
                  "Smoothing before selection: none (structkv's default), avg (snapkv's, "
                  "pyramidkv's, gemfilter's) or max (fastkv's)")
      ->check(CLI::IsMember({"none", "avg", "max"}))
      ->group(kMethodGroup);
  app->add_option("--pooling-kernel", f->pooling_kernel, "Odd number of tokens (5, fastkv 7)")
      ->group(kMethodGroup);
  app->add_option("--window-reduce", f->window_reduce,
                  "How the window's queries become one: mean (default), sum or max")
      ->check(CLI::IsMember({"mean", "sum", "max"}))
      ->group(kMethodGroup);
  app->add_option("--group-reduce", f->group_reduce,
                  "How a KV head's query heads then become one: sum (default), mean or max")
      ->check(CLI::IsMember({"sum", "mean", "max"}))
      ->group(kMethodGroup);
  app->add_option("--sinks", f->sinks, "First tokens that streaming_llm keeps (4)")
      ->group(kMethodGroup);
  app->add_option("--beta", f->beta, "How many times pyramidkv's mean budget is the last's (20)")
      ->group(kMethodGroup);
  app->add_option("--tsp-layer", f->tsp_layer, "The layer that chooses fastkv's skeleton")
      ->group(kMethodGroup);
  app->add_option("--filter-layer", f->filter_layer, "The layer that chooses gemfilter's tokens")
      ->group(kMethodGroup);
  app->add_option("--recent-share", f->recent_share,
                  "Share of h2o's budget for the latest tokens (0.5)")
      ->group(kMethodGroup);
  app->add_option("--decay", f->decay, "Decay of the centrality per layer (0.9)")
      ->group(kPivotGroup);
  app->add_option("--skeleton-budget", f->skeleton_budget,
                  "Share of the tokens in the skeleton (0.20)")
      ->group(kPivotGroup);
  app->add_option("--skeleton-budget-kind", f->skeleton_budget_kind, "As --budget-kind")
      ->check(kinds)
      ->group(kPivotGroup);
  app->add_option("--pivot", f->pivot, "exact (default), online, fixed or profiled")
      ->check(CLI::IsMember({"exact", "online", "fixed", "profiled"}))
      ->group(kPivotGroup);
  app->add_option("--pivot-layer", f->pivot_layer, "The pivot layer for --pivot fixed")
      ->group(kPivotGroup);
  app->add_option("--sparsity-ratio", f->sparsity_ratio,
                  "Share of the tokens whose mass is the sparsity (0.1)")
      ->group(kPivotGroup);
  app->add_option("--pivot-weights", f->pivot_weights,
                  "Weights of entropy, sparsity and variance (0.2 0.3 0.5)")
      ->expected(3)
      ->group(kPivotGroup);
  app->add_option("--pivot-search", f->pivot_search,
                  "Where the transition is looked for, as shares of the depth (0.25 0.75)")
      ->expected(2)
      ->group(kPivotGroup);
  app->add_option("--pivot-patience", f->pivot_patience,
                  "online, profiled: layers that must not beat the best one (2)")
      ->group(kPivotGroup);
  app->add_option("--pivot-deadline", f->pivot_deadline,
                  "online, profiled: share of the depth at which to answer (the search's end)")
      ->group(kPivotGroup);
  app->add_option("--pivot-score", f->pivot_score,
                  "online, profiled: share of the highest score that confirms a layer (0.5)")
      ->group(kPivotGroup);
  app->add_option("--profile-prompts", f->profile_prompts,
                  "profiled: prompts that a model's profile must rest on (8)")
      ->group(kPivotGroup);
}

namespace {

// What a method cannot do without, by the flag's name rather than the protocol's.
absl::Status CheckGivenLayer(const MethodFlags& flags) {
  if (flags.method == "fastkv" && !flags.tsp_layer.has_value()) {
    return absl::InvalidArgumentError(
        "--tsp-layer: fastkv needs the layer that chooses the skeleton (Llama-3.1-8B: 15)");
  }
  if (flags.method == "gemfilter" && !flags.filter_layer.has_value()) {
    return absl::InvalidArgumentError(
        "--filter-layer: gemfilter needs the layer that chooses the tokens (Llama-3.1-8B: 13)");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<v1::Method> BuildMethod(const MethodFlags& flags) {
  Remaining rest;
  rest.Add("--kv-budget", flags.kv_budget);
  rest.Add("--budget-kind", flags.budget_kind);
  rest.Add("--window", flags.window);
  rest.Add("--granularity", flags.granularity);
  rest.Add("--pooling", flags.pooling);
  rest.Add("--pooling-kernel", flags.pooling_kernel);
  rest.Add("--window-reduce", flags.window_reduce);
  rest.Add("--group-reduce", flags.group_reduce);
  rest.Add("--sinks", flags.sinks);
  rest.Add("--beta", flags.beta);
  rest.Add("--tsp-layer", flags.tsp_layer);
  rest.Add("--filter-layer", flags.filter_layer);
  rest.Add("--recent-share", flags.recent_share);
  rest.Add("--decay", flags.decay);
  rest.Add("--skeleton-budget", flags.skeleton_budget);
  rest.Add("--skeleton-budget-kind", flags.skeleton_budget_kind);
  rest.Add("--pivot", flags.pivot);
  rest.Add("--pivot-layer", flags.pivot_layer);
  rest.Add("--sparsity-ratio", flags.sparsity_ratio);
  rest.Add("--pivot-weights", flags.pivot_weights);
  rest.Add("--pivot-search", flags.pivot_search);
  rest.Add("--pivot-patience", flags.pivot_patience);
  rest.Add("--pivot-deadline", flags.pivot_deadline);
  rest.Add("--pivot-score", flags.pivot_score);
  rest.Add("--profile-prompts", flags.profile_prompts);

  v1::Method method;
  if (flags.method == "structkv") {
    TakeStructKv(flags, &rest, method.mutable_structkv());
  } else if (flags.method == "snapkv") {
    TakeScoring(flags, &rest, method.mutable_snapkv());
    TakeGranularity(flags, &rest, method.mutable_snapkv());
  } else if (flags.method == "pyramidkv") {
    TakePyramidKv(flags, &rest, method.mutable_pyramidkv());
  } else if (flags.method == "fastkv") {
    TakeFastKv(flags, &rest, method.mutable_fastkv());
  } else if (flags.method == "gemfilter") {
    TakeGemFilter(flags, &rest, method.mutable_gemfilter());
  } else if (flags.method == "h2o") {
    TakeH2o(flags, &rest, method.mutable_h2o());
  } else if (flags.method == "streaming_llm") {
    v1::StreamingLlmMethod* kind = method.mutable_streaming_llm();
    TakeBudget(flags, &rest, kind);
    rest.Take("--sinks", flags.sinks, [&](uint32_t v) { kind->set_sink_tokens(v); });
  } else if (flags.method == "full") {
    method.mutable_full();
  } else {
    return absl::InvalidArgumentError(absl::StrCat("--method ", flags.method, " is unknown"));
  }
  absl::Status status = rest.Check(flags.method);
  if (status.ok()) status = CheckGivenLayer(flags);
  if (!status.ok()) return status;
  return method;
}

std::string MethodKind(const v1::Method& method) {
  const google::protobuf::OneofDescriptor* kind = v1::Method::descriptor()->FindOneofByName("kind");
  const google::protobuf::FieldDescriptor* field =
      method.GetReflection()->GetOneofFieldDescriptor(method, kind);
  return field == nullptr ? "" : field->name();
}

std::map<std::string, std::string> MethodMetadata(const v1::Method& method) {
  std::map<std::string, std::string> out;
  out["method"] = MethodKind(method);
  std::map<std::string, std::string> parameters;
  Flatten(method, "method", &parameters);
  // "method.structkv.decay" -> "method.decay"
  const std::string prefix = absl::StrCat("method.", MethodKind(method), ".");
  for (const auto& [name, value] : parameters) {
    out[absl::StrCat("method.", absl::StripPrefix(name, prefix))] = value;
  }
  return out;
}

std::string PivotModeText(v1::PivotMode mode) {
  const auto* value = v1::PivotMode_descriptor()->FindValueByNumber(mode);
  return value == nullptr ? absl::StrCat(static_cast<int>(mode)) : EnumText(*value);
}

std::string NumberText(double value) {
  char text[32];
  const auto end = std::to_chars(std::begin(text), std::end(text), value);
  return {text, end.ptr};
}

}  // namespace structkv::cli
