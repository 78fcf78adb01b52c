#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cli/attention_error.h"
#include "client/cli/capture.h"
#include "client/cli/commands.h"
#include "client/cli/compressor.h"
#include "client/cli/method_flags.h"
#include "client/cli/text.h"
#include "nlohmann/json.hpp"

namespace structkv::cli {
namespace {

struct CompareFlags {
  std::string input;
  std::vector<std::string> methods = MethodNames();
  double kv_budget = 0.10;
  ConnectionFlags connection;
  bool json = false;
};

// One method's row.
struct Comparison {
  std::string method;
  uint32_t kept = 0;
  uint64_t bytes = 0;
  AttentionError error;
  std::optional<client::PivotResult> pivot;
};

// The transition score as a bar of at most `cells`, negative ones to nothing.
std::string Bar(double value, double highest, size_t cells) {
  if (!(value > 0) || highest <= 0) return "";
  const auto full = static_cast<size_t>(std::lround(value / highest * static_cast<double>(cells)));
  std::string bar;
  for (size_t i = 0; i < full; ++i) bar += "▇";
  return bar;
}

void PrintPivot(const client::PivotResult& pivot) {
  double highest = 0;
  for (const v1::LayerMetrics& layer : pivot.layers) {
    if (layer.has_transition()) highest = std::max(highest, layer.transition());
  }
  const std::string decided = pivot.mode == v1::PIVOT_MODE_ONLINE
                                  ? absl::StrCat(" (online, at layer ", pivot.decided_at_layer, ")")
                                  : "";
  std::printf("\nStructKV's pivot is layer %u%s: past it, layers need %s skeleton tokens.\n\n",
              pivot.pivot_layer, decided.c_str(), CountText(pivot.skeleton.size()).c_str());
  std::string text = "  layer  entropy  sparsity  variance  transition\n";
  for (const v1::LayerMetrics& layer : pivot.layers) {
    const bool is_pivot = layer.layer() == pivot.pivot_layer;
    const bool is_transition =
        pivot.transition_layer.has_value() && layer.layer() == *pivot.transition_layer;
    const std::string score =
        layer.has_transition() ? absl::StrFormat("%+.3f", layer.transition()) : "";
    std::string line = absl::StrFormat(
        "  %5d  %7.3f  %8.3f  %8.2f  %10s  %s%s%s", layer.layer(), layer.entropy(),
        layer.sparsity(), layer.variance(), score,
        layer.has_transition() ? Bar(layer.transition(), highest, 20) : "",
        is_transition ? " highest in the search range" : "", is_pivot ? " <- pivot" : "");
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  std::fputs(text.c_str(), stdout);
}

void PrintTable(const CompareFlags& flags, const Capture& capture,
                const std::vector<Comparison>& rows) {
  const v1::ModelGeometry& g = capture.geometry();
  std::printf("%s: %u layers, %u query and %u KV heads of %u, %s tokens, %s\n\n",
              flags.input.c_str(), g.layer_count(), g.query_head_count(), g.kv_head_count(),
              g.key_dim(), CountText(capture.prompt_tokens()).c_str(),
              capture.dtype_name().c_str());
  Table table({"method", "kept tokens", "bytes before", "bytes after", "share", "error, mean",
               "error, worst layer", "pivot"});
  for (const Comparison& row : rows) {
    table.Add(
        {row.method, CountText(row.kept), CountText(capture.kv_bytes()), CountText(row.bytes),
         PercentText(static_cast<double>(row.bytes) / static_cast<double>(capture.kv_bytes())),
         PercentText(row.error.mean),
         absl::StrCat(PercentText(row.error.worst), " (", row.error.worst_layer, ")"),
         row.pivot.has_value() ? absl::StrCat("layer ", row.pivot->pivot_layer) : "-"});
  }
  std::fputs(table.Text("  ").c_str(), stdout);
  std::printf(
      "\nError: attention outputs of the %u tokens after the prompt, against the full cache\n"
      "(relative L2 over heads and queries, per layer).\n",
      capture.future_tokens());
  for (const Comparison& row : rows) {
    if (row.pivot.has_value()) PrintPivot(*row.pivot);
  }
}

void PrintJson(const CompareFlags& flags, const Capture& capture,
               const std::vector<Comparison>& rows) {
  nlohmann::ordered_json json;
  json["input"] = flags.input;
  json["prompt_tokens"] = capture.prompt_tokens();
  json["future_tokens"] = capture.future_tokens();
  json["kv_budget"] = flags.kv_budget;
  json["kv_bytes_before"] = capture.kv_bytes();
  json["methods"] = nlohmann::ordered_json::array();
  for (const Comparison& row : rows) {
    nlohmann::ordered_json entry;
    entry["method"] = row.method;
    entry["kept_tokens"] = row.kept;
    entry["kv_bytes_after"] = row.bytes;
    entry["error_mean"] = row.error.mean;
    entry["error_worst"] = row.error.worst;
    entry["error_worst_layer"] = row.error.worst_layer;
    entry["error_layers"] = row.error.layers;
    if (row.pivot.has_value()) {
      entry["pivot_layer"] = row.pivot->pivot_layer;
      if (row.pivot->transition_layer.has_value()) {
        entry["transition_layer"] = *row.pivot->transition_layer;
      }
      entry["skeleton_tokens"] = row.pivot->skeleton.size();
      for (const v1::LayerMetrics& layer : row.pivot->layers) {
        nlohmann::ordered_json score;
        score["layer"] = layer.layer();
        score["entropy"] = layer.entropy();
        score["sparsity"] = layer.sparsity();
        score["variance"] = layer.variance();
        if (layer.has_transition()) score["transition"] = layer.transition();
        entry["layers"].push_back(std::move(score));
      }
    }
    json["methods"].push_back(std::move(entry));
  }
  std::printf("%s\n", json.dump(2).c_str());
}

absl::StatusOr<Comparison> CompareMethod(const CompareFlags& flags, const Capture& capture,
                                         const AttentionOutputs& full, const std::string& name,
                                         Compressor& compressor) {
  MethodFlags method_flags;
  method_flags.method = name;
  if (name != "full") method_flags.kv_budget = flags.kv_budget;
  absl::StatusOr<v1::Method> method = BuildMethod(method_flags);
  if (!method.ok()) return method.status();
  v1::Open open = capture.MakeOpen();
  *open.mutable_method() = *method;
  if (method->has_structkv() || method->has_snapkv()) {
    open.set_statistic(capture.statistic());
    open.set_window_lse(capture.has_lse());
  }
  v1::Opened opened;
  client::SessionOptions options = MakeSessionOptions(flags.connection);
  options.on_opened = [&opened](const v1::Opened& o) { opened = o; };
  const auto source = [&](uint32_t layer) { return capture.Layer(layer, opened); };
  absl::StatusOr<client::Compressed> compressed = compressor.Collect(open, source, options);
  if (!compressed.ok()) {
    return absl::Status(compressed.status().code(),
                        absl::StrCat(name, ": ", compressed.status().message()));
  }
  absl::StatusOr<AttentionOutputs> outputs = CompactedAttention(capture, *compressed);
  if (!outputs.ok()) return outputs.status();
  Comparison row;
  row.method = name;
  row.kept = compressed->summary.kv_length();
  for (const client::LayerResult& layer : compressed->layers) {
    row.bytes += layer.keys.size() + layer.values.size();
  }
  row.error = CompareAttention(full, *outputs);
  row.pivot = std::move(compressed->pivot);
  return row;
}

absl::Status RunCompare(const CompareFlags& flags) {
  absl::StatusOr<Capture> capture = Capture::Open(flags.input);
  if (!capture.ok()) return capture.status();
  absl::StatusOr<std::unique_ptr<Compressor>> compressor = MakeCompressor(flags.connection);
  if (!compressor.ok()) return compressor.status();
  absl::StatusOr<AttentionOutputs> full = FullAttention(*capture);
  if (!full.ok()) return full.status();
  Progress progress("comparing");
  std::vector<Comparison> rows;
  for (const std::string& method : flags.methods) {
    progress.Update(rows.size(), flags.methods.size(), method);
    absl::StatusOr<Comparison> row = CompareMethod(flags, *capture, *full, method, **compressor);
    if (!row.ok()) return row.status();
    rows.push_back(*std::move(row));
  }
  progress.Clear();
  if (flags.json) {
    PrintJson(flags, *capture, rows);
  } else {
    PrintTable(flags, *capture, rows);
  }
  return absl::OkStatus();
}

}  // namespace

Command AddCompare(CLI::App* app) {
  auto flags = std::make_shared<CompareFlags>();
  CLI::App* sub = app->add_subcommand(
      "compare", "Compare the methods on a captured prefill: bytes, error of attention, pivot");
  sub->add_option("input", flags->input, "Captured prefill with future tokens (safetensors)")
      ->required();
  sub->add_option("--methods", flags->methods, "Methods to compare")
      ->delimiter(',')
      ->check(CLI::IsMember(MethodNames()))
      ->capture_default_str();
  sub->add_option("--kv-budget", flags->kv_budget, "Share of the tokens that each layer keeps")
      ->capture_default_str();
  AddConnectionFlags(sub, &flags->connection);
  sub->add_flag("--json", flags->json, "Print JSON");
  return {sub, [flags] { return RunCompare(*flags); }};
}

}  // namespace structkv::cli
