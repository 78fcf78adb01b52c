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
#include "client/cli/geometry_text.h"
#include "client/cli/kept.h"
#include "client/cli/method_flags.h"
#include "client/cli/output_file.h"
#include "client/cli/overlap.h"
#include "client/cli/svg_compare.h"
#include "client/cli/text.h"
#include "nlohmann/json.hpp"

namespace structkv::cli {
namespace {

// Where the papers' layers lie in Llama-3.1-8B's 32.
constexpr double kTspDepth = 15.0 / 32;
constexpr double kFilterDepth = 13.0 / 32;

struct CompareFlags {
  std::string input;
  std::vector<std::string> methods = MethodNames();
  double kv_budget = 0.10;
  std::optional<uint32_t> tsp_layer;
  std::optional<uint32_t> filter_layer;
  std::string column_sums;
  std::string output;  // the picture; none where it is empty
  ConnectionFlags connection;
  bool json = false;
};

// One method's row.
struct Comparison {
  std::string method;
  Kept kept;
  uint64_t bytes = 0;
  std::optional<AttentionError> error;  // none where there is no compacted cache
  std::optional<double> overlap;        // none without structkv in the comparison
  KeptSets sets;
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
  std::printf("%s: %u layers, %s, %s tokens, %s\n\n", flags.input.c_str(), g.layer_count(),
              HeadsText(g).c_str(), CountText(capture.prompt_tokens()).c_str(),
              capture.dtype_name().c_str());
  Table table({"method", "kept tokens", "bytes before", "bytes after", "share", "error, mean",
               "error, worst layer", "overlap", "pivot"});
  for (const Comparison& row : rows) {
    table.Add(
        {row.method, KeptText(row.kept.least, row.kept.most), CountText(capture.kv_bytes()),
         CountText(row.bytes),
         PercentText(static_cast<double>(row.bytes) / static_cast<double>(capture.kv_bytes())),
         row.error.has_value() ? PercentText(row.error->mean) : "-",
         row.error.has_value()
             ? absl::StrCat(PercentText(row.error->worst), " (", row.error->worst_layer, ")")
             : "-",
         row.overlap.has_value() ? PercentText(*row.overlap) : "-",
         row.pivot.has_value() ? absl::StrCat("layer ", row.pivot->pivot_layer) : "-"});
  }
  std::fputs(table.Text("  ").c_str(), stdout);
  std::printf(
      "\nError: attention outputs of the %u tokens after the prompt, against the full cache\n"
      "(relative L2 over heads and queries, per layer). Overlap: the share of structkv's tokens,\n"
      "over layers and KV heads, that the method keeps as well.\n",
      capture.future_tokens());
  for (const Comparison& row : rows) {
    if (!row.error.has_value()) {
      std::printf("%s prefills again with its tokens: there is no compacted cache to measure.\n",
                  row.method.c_str());
    }
  }
  for (const Comparison& row : rows) {
    if (row.method == "structkv" && row.pivot.has_value()) PrintPivot(*row.pivot);
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
    entry["kept_tokens"] = row.kept.most;
    entry["least_kept_tokens"] = row.kept.least;
    entry["kv_bytes_after"] = row.bytes;
    if (row.error.has_value()) {
      entry["error_mean"] = row.error->mean;
      entry["error_worst"] = row.error->worst;
      entry["error_worst_layer"] = row.error->worst_layer;
      entry["error_layers"] = row.error->layers;
    }
    if (row.overlap.has_value()) entry["overlap_with_structkv"] = *row.overlap;
    for (const Comparison& other : rows) {
      entry["kept_too_by"][other.method] = Overlap(row.sets, other.sets);
    }
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

// The layer that is `share` of the way up, where none is given.
uint32_t LayerAt(std::optional<uint32_t> given, double share, uint32_t layers) {
  if (given.has_value()) return *given;
  return std::min(layers - 1, static_cast<uint32_t>(std::lround(share * layers)));
}

absl::StatusOr<Comparison> CompareMethod(const CompareFlags& flags, const Capture& capture,
                                         const AttentionOutputs& full, const std::string& name,
                                         Compressor& compressor) {
  MethodFlags method_flags;
  method_flags.method = name;
  if (name != "full") method_flags.kv_budget = flags.kv_budget;
  const uint32_t layers = capture.geometry().layer_count();
  if (name == "fastkv") method_flags.tsp_layer = LayerAt(flags.tsp_layer, kTspDepth, layers);
  if (name == "gemfilter") {
    method_flags.filter_layer = LayerAt(flags.filter_layer, kFilterDepth, layers);
  }
  absl::StatusOr<v1::Method> method = BuildMethod(method_flags);
  if (!method.ok()) return method.status();
  v1::Open open = capture.MakeOpen();
  *open.mutable_method() = *method;
  if (absl::Status status = capture.SetStatistic(&open); !status.ok()) return status;
  if (method->has_gemfilter()) open.set_output(v1::OUTPUT_PLAN);
  v1::Opened opened;
  client::SessionOptions options = MakeSessionOptions(flags.connection);
  options.on_opened = [&opened](const v1::Opened& o) { opened = o; };
  const auto source = [&](uint32_t layer) { return capture.Layer(layer, opened); };
  absl::StatusOr<client::Compressed> compressed = compressor.Collect(open, source, options);
  if (!compressed.ok()) {
    return absl::Status(compressed.status().code(),
                        absl::StrCat(name, ": ", compressed.status().message()));
  }
  Comparison row;
  row.method = name;
  row.kept = KeptOf(compressed->opened);
  row.bytes = capture.kv_bytes() / layers / capture.prompt_tokens() * row.kept.total;
  row.sets = KeptSetsOf(*compressed, capture.geometry().kv_head_count());
  if (open.output() != v1::OUTPUT_PLAN) {
    absl::StatusOr<AttentionOutputs> outputs = CompactedAttention(capture, *compressed);
    if (!outputs.ok()) return outputs.status();
    row.error = CompareAttention(full, *outputs);
  }
  row.pivot = std::move(compressed->pivot);
  return row;
}

void SetOverlaps(std::vector<Comparison>* rows) {
  const auto base = std::find_if(rows->begin(), rows->end(),
                                 [](const Comparison& row) { return row.method == "structkv"; });
  if (base == rows->end()) return;
  for (Comparison& row : *rows) row.overlap = Overlap(base->sets, row.sets);
}

absl::Status Draw(const CompareFlags& flags, const Capture& capture,
                  const std::vector<Comparison>& rows) {
  ComparisonPicture picture;
  const auto model = capture.metadata().find("model_id");
  if (model != capture.metadata().end()) picture.model = model->second;
  picture.prompt_tokens = capture.prompt_tokens();
  picture.future_tokens = capture.future_tokens();
  picture.kv_budget = flags.kv_budget;
  picture.full_bytes = capture.kv_bytes();
  for (const Comparison& row : rows) {
    ComparedMethod& method = picture.methods.emplace_back();
    method = {.name = row.method, .bytes = row.bytes, .sets = row.sets};
    if (row.error.has_value()) {
      method.error = row.error->mean;
      method.worst_error = row.error->worst;
    }
    if (row.pivot.has_value()) method.pivot_layer = row.pivot->pivot_layer;
  }
  return WriteFile(flags.output, RenderComparison(picture));
}

absl::Status RunCompare(const CompareFlags& flags) {
  if (absl::Status status = CheckNotInput(flags.output, flags.input); !status.ok()) return status;
  absl::StatusOr<Capture> capture = Capture::Open(flags.input);
  if (!capture.ok()) return capture.status();
  if (!flags.column_sums.empty()) {
    absl::Status sums = capture->ReadColumnSums(flags.column_sums);
    if (!sums.ok()) return sums;
  }
  absl::StatusOr<std::unique_ptr<Compressor>> compressor = MakeCompressor(flags.connection);
  if (!compressor.ok()) return compressor.status();
  absl::StatusOr<AttentionOutputs> full = FullAttention(*capture);
  if (!full.ok()) return full.status();
  Progress progress("comparing");
  std::vector<Comparison> rows;
  std::vector<std::string> left_out;
  for (const std::string& method : flags.methods) {
    progress.Update(rows.size(), flags.methods.size(), method);
    absl::StatusOr<Comparison> row = CompareMethod(flags, *capture, *full, method, **compressor);
    if (row.status().code() == absl::StatusCode::kFailedPrecondition) {
      // The capture lacks what this method needs; the others still compare.
      left_out.push_back(absl::StrCat(method, " was left out: ", row.status().message()));
      continue;
    }
    if (!row.ok()) return row.status();
    rows.push_back(*std::move(row));
  }
  progress.Clear();
  SetOverlaps(&rows);
  for (const std::string& text : left_out) std::fprintf(stderr, "%s\n", text.c_str());
  if (!flags.output.empty()) {
    if (absl::Status drawn = Draw(flags, *capture, rows); !drawn.ok()) return drawn;
  }
  if (flags.json) {
    PrintJson(flags, *capture, rows);
  } else {
    PrintTable(flags, *capture, rows);
    if (!flags.output.empty()) std::printf("\nplot      %s\n", flags.output.c_str());
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
  sub->add_option("--tsp-layer", flags->tsp_layer,
                  "The layer that chooses fastkv's skeleton (15/32 of the depth)");
  sub->add_option("--filter-layer", flags->filter_layer,
                  "The layer that chooses gemfilter's tokens (13/32 of the depth)");
  sub->add_option("--column-sums", flags->column_sums,
                  "What h2o needs where the capture lacks it (safetensors)");
  sub->add_option("--out,-o", flags->output, "Picture of the comparison to write (SVG)");
  AddConnectionFlags(sub, &flags->connection);
  sub->add_flag("--json", flags->json, "Print JSON");
  return {sub, [flags] { return RunCompare(*flags); }};
}

}  // namespace structkv::cli
