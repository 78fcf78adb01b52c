#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <variant>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cli/capture.h"
#include "client/cli/commands.h"
#include "client/cli/compacted_file.h"
#include "client/cli/compressor.h"
#include "client/cli/geometry_text.h"
#include "client/cli/kept.h"
#include "client/cli/method_flags.h"
#include "client/cli/output_file.h"
#include "client/cli/rotary_flags.h"
#include "client/cli/shared_memory.h"
#include "client/cli/text.h"
#include "nlohmann/json.hpp"
#include "structkv/sizes.h"

namespace structkv::cli {
namespace {

struct CompressFlags {
  std::string input;
  std::string output;
  std::string column_sums;
  MethodFlags method;
  RotaryFlags rotary;
  ConnectionFlags connection;
  bool plan = false;
  bool pull = false;
  bool hold = false;
  double hold_lease_seconds = 0;  // 0: the server's default
  bool saliency = false;
  bool centrality = false;
  bool checksums = false;
  bool skeleton_layers = false;
  bool json = false;
};

// What is told about a prompt that was compressed.
struct Outcome {
  v1::Opened opened;
  std::optional<client::PivotResult> pivot;
  v1::Summary summary;
  absl::Duration elapsed;
  uint64_t full_bytes = 0;       // of the input, were every layer sent in full
  uint32_t skeleton_layers = 0;  // sent as skeleton rows
  bool pulls_keys = false;
};

absl::StatusOr<v1::Open> MakeOpen(const CompressFlags& flags, const Capture& capture) {
  absl::StatusOr<v1::Method> method = BuildMethod(flags.method);
  if (!method.ok()) return method.status();
  v1::Open open = capture.MakeOpen();
  *open.mutable_method() = *std::move(method);
  if (absl::Status status = capture.SetStatistic(&open); !status.ok()) return status;
  if (flags.skeleton_layers) {
    const v1::PivotMode mode = open.method().structkv().pivot().mode();
    const bool early = open.method().has_structkv() && mode != v1::PIVOT_MODE_UNSPECIFIED &&
                       mode != v1::PIVOT_MODE_EXACT;
    if (!early && !open.method().has_fastkv()) {
      return absl::InvalidArgumentError(
          "--skeleton-layers needs the method structkv with --pivot online, fixed or profiled, or "
          "fastkv");
    }
    // A layer of skeleton rows would need the log-sum-exp over the skeleton's keys.
    open.set_window_lse(false);
  }
  if (flags.hold && open.method().has_gemfilter()) {
    return absl::InvalidArgumentError("--hold: gemfilter leaves no cache to hold");
  }
  const bool plan = flags.plan || open.method().has_gemfilter();
  open.set_output(plan ? v1::OUTPUT_PLAN : v1::OUTPUT_COMPACT);
  if (flags.hold) {
    open.set_output(v1::OUTPUT_HOLD);
    if (flags.hold_lease_seconds > 0) {
      open.mutable_hold()->set_lease_millis(
          static_cast<uint64_t>(std::ceil(flags.hold_lease_seconds * 1000)));
    }
  }
  SetRotary(flags.rotary, capture.metadata(), &open);
  if (flags.pull) {
    open.set_pull(open.statistic() == v1::STATISTIC_WINDOW_QUERIES ? v1::PULL_VALUES
                                                                   : v1::PULL_KEYS_AND_VALUES);
  }
  open.set_return_saliency(flags.saliency);
  open.set_return_centrality(flags.centrality);
  return open;
}

// How the pivot was found, where it was not after the last layer.
std::string PivotText(const client::PivotResult& pivot) {
  switch (pivot.mode) {
    case v1::PIVOT_MODE_ONLINE:
      return absl::StrCat(", decided online at layer ", pivot.decided_at_layer);
    case v1::PIVOT_MODE_PROFILED:
      return absl::StrCat(", from the profile of ", CountText(pivot.profiled_prompts), " prompts");
    default:
      return "";
  }
}

// Bytes of the tensors of all layers in full.
uint64_t FullBytes(const v1::Open& open, const v1::Opened& asked) {
  const v1::Opened opened = WithPulledTensors(open, asked);
  uint64_t bytes = 0;
  for (int tensor : opened.required_tensors()) {
    bytes += client::InputTensorBytes(open, opened, static_cast<v1::Tensor>(tensor));
  }
  return bytes * open.geometry().layer_count();
}

uint64_t BytesAfter(const Capture& capture, const v1::Opened& opened) {
  const uint64_t rows = uint64_t{capture.prompt_tokens()} * capture.geometry().layer_count();
  return capture.kv_bytes() / rows * KeptOf(opened).total;
}

void PrintOutcome(const CompressFlags& flags, const Capture& capture, const Outcome& outcome) {
  const v1::Summary& summary = outcome.summary;
  const v1::ModelGeometry& g = capture.geometry();
  const uint64_t before = capture.kv_bytes();
  const uint64_t after = BytesAfter(capture, outcome.opened);
  const Kept kept = KeptOf(outcome.opened);
  std::printf("input     %s: %s layers, %s, %s tokens, %s\n",
              std::filesystem::path(flags.input).filename().c_str(),
              CountText(g.layer_count()).c_str(), HeadsText(g).c_str(),
              CountText(capture.prompt_tokens()).c_str(), capture.dtype_name().c_str());
  std::printf("method    %s, %s of %s tokens kept in each layer\n",
              MethodKind(outcome.opened.method()).c_str(), KeptText(kept.least, kept.most).c_str(),
              CountText(summary.logical_length()).c_str());
  std::printf("KV cache  %s -> %s (%s)%s\n", BytesText(before).c_str(), BytesText(after).c_str(),
              PercentText(static_cast<double>(after) / static_cast<double>(before)).c_str(),
              outcome.opened.method().has_gemfilter() ? " after a second prefill; positions only"
              : flags.plan                            ? ", positions only"
                                                      : "");
  if (outcome.opened.has_rotary()) {
    std::printf("positions turned to consecutive ones; a decoder goes on at %s\n",
                CountText(summary.next_position()).c_str());
  }
  if (outcome.pivot.has_value()) {
    std::printf("pivot     layer %u of %u, skeleton of %s tokens%s\n", outcome.pivot->pivot_layer,
                g.layer_count(), CountText(outcome.pivot->skeleton.size()).c_str(),
                PivotText(*outcome.pivot).c_str());
  }
  if (flags.pull && !flags.skeleton_layers) {
    std::printf("sent      %s of %s; the rows of %s that stay alone\n",
                BytesText(summary.input_bytes()).c_str(), BytesText(outcome.full_bytes).c_str(),
                outcome.pulls_keys ? "keys and values" : "values");
  }
  if (flags.skeleton_layers) {
    std::printf("sent      %s of %s, %u of %u layers as skeleton rows; %s not sent\n",
                BytesText(summary.input_bytes()).c_str(), BytesText(outcome.full_bytes).c_str(),
                outcome.skeleton_layers, g.layer_count(),
                BytesText(outcome.full_bytes - summary.input_bytes()).c_str());
  }
  std::printf("time      %s, of which the %s backend computed %s; transport %s\n",
              DurationText(outcome.elapsed).c_str(), summary.backend().c_str(),
              DurationText(absl::Microseconds(summary.timing().compute_micros())).c_str(),
              summary.transport().c_str());
  if (summary.has_held()) {
    // Of several servers, the one that has it.
    const std::string& at = summary.held().replica();
    std::printf("held      %s, %s for %s%s, fingerprint %s\n",
                absl::BytesToHexString(summary.held().handle()).c_str(),
                BytesText(summary.held().size_bytes()).c_str(),
                absl::FormatDuration(absl::Milliseconds(summary.held().lease_millis())).c_str(),
                at == flags.connection.server ? "" : absl::StrCat(" at ", at).c_str(),
                summary.fingerprint().c_str());
  } else {
    std::printf("output    %s, fingerprint %s\n", flags.output.c_str(),
                summary.fingerprint().c_str());
  }
}

void PrintJson(const CompressFlags& flags, const Capture& capture, const Outcome& outcome) {
  const v1::Summary& summary = outcome.summary;
  nlohmann::ordered_json json;
  json["input"] = flags.input;
  if (summary.has_held()) {
    json["handle"] = absl::BytesToHexString(summary.held().handle());
    json["held_bytes"] = summary.held().size_bytes();
    json["lease_millis"] = summary.held().lease_millis();
    json["replica"] = summary.held().replica();
  } else {
    json["output"] = flags.output;
  }
  for (const auto& [key, value] : MethodMetadata(outcome.opened.method())) json[key] = value;
  json["kv_bytes_before"] = capture.kv_bytes();
  json["kv_bytes_after"] = BytesAfter(capture, outcome.opened);
  json["logical_length"] = summary.logical_length();
  json["kv_length"] = summary.kv_length();
  json["next_position"] = summary.next_position();
  if (outcome.opened.has_rotary()) {
    std::map<std::string, std::string> rotary;
    Flatten(outcome.opened.rotary(), "rotary", &rotary);
    for (const auto& [key, value] : rotary) json[key] = value;
  }
  json["input_bytes"] = summary.input_bytes();
  json["output_bytes"] = summary.output_bytes();
  if (flags.skeleton_layers) json["skeleton_layers"] = outcome.skeleton_layers;
  if (flags.skeleton_layers || flags.pull) {
    json["input_bytes_not_sent"] = outcome.full_bytes - summary.input_bytes();
  }
  if (outcome.pivot.has_value()) {
    json["pivot_layer"] = outcome.pivot->pivot_layer;
    if (outcome.pivot->transition_layer.has_value()) {
      json["transition_layer"] = *outcome.pivot->transition_layer;
    }
    json["skeleton_tokens"] = outcome.pivot->skeleton.size();
    json["pivot_mode"] = PivotModeText(outcome.pivot->mode);
    json["decided_at_layer"] = outcome.pivot->decided_at_layer;
    if (outcome.pivot->skeleton_from_layer.has_value()) {
      json["skeleton_from_layer"] = *outcome.pivot->skeleton_from_layer;
    }
    if (outcome.pivot->mode == v1::PIVOT_MODE_PROFILED) {
      json["profiled_prompts"] = outcome.pivot->profiled_prompts;
    }
  }
  json["fingerprint"] = summary.fingerprint();
  json["backend"] = summary.backend();
  json["transport"] = summary.transport();
  json["transport_reason"] = outcome.opened.transport_reason();
  json["seconds"] = absl::ToDoubleSeconds(outcome.elapsed);
  json["compute_micros"] = summary.timing().compute_micros();
  json["queue_micros"] = summary.timing().queue_micros();
  std::printf("%s\n", json.dump(2).c_str());
}

// A few layers of keys and values on their way, and the results.
uint64_t SharedBytes(const v1::Open& open, const Capture& capture) {
  constexpr uint64_t kLayers = 5;
  const uint64_t layer = capture.kv_bytes() / open.geometry().layer_count();
  return kLayers * (layer + uint64_t{4096}) + client::MostResultBytes(open);
}

// The file has room for what `Opened` says, in every layer.
absl::Status CheckSkeletonFits(const CompressFlags& flags, const v1::Opened& opened) {
  if (!flags.skeleton_layers || opened.skeleton_tokens() >= opened.kept_tokens(0)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "--skeleton-layers: the skeleton has ", opened.skeleton_tokens(),
      " tokens, and a layer keeps ", opened.kept_tokens(0), "; it must not keep more"));
}

absl::Status RunCompress(const CompressFlags& flags) {
  if (flags.output.empty() != flags.hold) {
    return absl::InvalidArgumentError(
        flags.hold ? "--hold leaves the cache in the server; --out is for `structkv fetch`"
                   : "--out is needed, unless --hold leaves the cache in the server");
  }
  if (!flags.hold) {
    absl::Status status = CheckNotInput(flags.output, flags.input);
    if (!status.ok()) return status;
  }
  absl::StatusOr<Capture> capture = Capture::Open(flags.input);
  if (!capture.ok()) return capture.status();
  if (!flags.column_sums.empty()) {
    absl::Status sums = capture->ReadColumnSums(flags.column_sums);
    if (!sums.ok()) return sums;
  }
  absl::StatusOr<v1::Open> open = MakeOpen(flags, *capture);
  if (!open.ok()) return open.status();
  absl::StatusOr<std::unique_ptr<Compressor>> compressor = MakeCompressor(flags.connection);
  if (!compressor.ok()) return compressor.status();

  Outcome outcome;
  outcome.pulls_keys = open->pull() == v1::PULL_KEYS_AND_VALUES;
  std::unique_ptr<CompactedFile> file;
  absl::Status written;
  Progress progress("compressing");
  uint32_t answered = 0;
  client::SessionOptions options = MakeSessionOptions(flags.connection);
  options.checksums = flags.checksums;
  const auto memory = MakeSharedMemory(flags.connection, SharedBytes(*open, *capture));
  if (!memory.ok()) return memory.status();
  UseSharedMemory(*memory, &options);
  options.on_opened = [&](const v1::Opened& opened) {
    outcome.opened = opened;
    outcome.full_bytes = FullBytes(*open, opened);
    outcome.skeleton_layers = 0;
    file.reset();  // of an attempt before
    written = CheckSkeletonFits(flags, opened);
    if (!written.ok() || flags.hold) return;
    absl::StatusOr<std::unique_ptr<CompactedFile>> created =
        CompactedFile::Create(flags.output, *open, opened, capture->metadata());
    written = created.status();
    if (created.ok()) file = *std::move(created);
  };
  options.on_event = [&](const client::Event& event) {
    if (!written.ok()) return;
    if (const auto* layer = std::get_if<client::LayerResult>(&event)) {
      const absl::StatusOr<client::LayerResult> rows = ToHost(*memory, *layer);
      written = rows.status();
      if (rows.ok() && file != nullptr) written = file->Add(*rows);
      progress.Update(++answered, capture->geometry().layer_count(), "layers");
    } else if (const auto* pivot = std::get_if<client::PivotResult>(&event)) {
      if (file != nullptr) written = file->Add(*pivot);
      outcome.pivot = *pivot;
    }
  };
  const auto source = [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
    if (!written.ok()) return written;
    return capture->Layer(layer, WithPulledTensors(*open, outcome.opened));
  };
  const auto stepped =
      [&](uint32_t layer,
          const client::PivotResult* pivot) -> absl::StatusOr<client::LayerTensors> {
    const bool full = pivot == nullptr || !pivot->skeleton_from_layer.has_value() ||
                      layer < *pivot->skeleton_from_layer;
    if (full || !written.ok()) return source(layer);
    ++outcome.skeleton_layers;
    return capture->SkeletonLayer(layer, WithPulledTensors(*open, outcome.opened), pivot->skeleton);
  };
  const absl::Time start = absl::Now();
  absl::StatusOr<v1::Summary> summary = flags.skeleton_layers
                                            ? (*compressor)->RunInSteps(*open, stepped, options)
                                            : (*compressor)->Run(*open, source, options);
  progress.Clear();
  if (!summary.ok()) return summary.status();
  if (!written.ok()) return written;
  outcome.elapsed = absl::Now() - start;
  outcome.summary = *std::move(summary);
  if (file != nullptr) {
    absl::Status status = file->Finish(outcome.summary);
    if (!status.ok()) return status;
  }
  if (flags.json) {
    PrintJson(flags, *capture, outcome);
  } else {
    PrintOutcome(flags, *capture, outcome);
  }
  return absl::OkStatus();
}

}  // namespace

Command AddCompress(CLI::App* app) {
  auto flags = std::make_shared<CompressFlags>();
  CLI::App* sub = app->add_subcommand("compress", "Compress a captured prefill into a file");
  sub->add_option("input", flags->input, "Captured prefill (safetensors)")->required();
  CLI::Option* out =
      sub->add_option("--out,-o", flags->output, "Compacted cache to write (safetensors)");
  AddMethodFlags(sub, &flags->method);
  AddRotaryFlags(sub, &flags->rotary);
  AddConnectionFlags(sub, &flags->connection);
  AddTransportFlag(sub, &flags->connection);
  sub->add_option("--column-sums", flags->column_sums,
                  "What h2o needs where the capture lacks it (safetensors)");
  CLI::Option* plan = sub->add_flag("--plan", flags->plan, "Positions only, no keys and values");
  sub->add_flag("--pull", flags->pull,
                "Send only the rows of values that the service asks for; with a saliency of the "
                "capture's own also those of keys")
      ->excludes(plan);
  CLI::Option* hold =
      sub->add_flag(
             "--hold", flags->hold,
             "Leave the compacted cache in the server, for `structkv fetch`, in place of --out")
          ->excludes(out)
          ->excludes(plan)
          ->excludes(sub->get_option("--in-process"));
  sub->add_option("--hold-lease", flags->hold_lease_seconds,
                  "Seconds that it stays without a renewal; 0: the server's default")
      ->check(CLI::Range(0.0, 1e9))
      ->needs(hold);
  CLI::Option* saliency =
      sub->add_flag("--saliency", flags->saliency, "Also write each layer's saliency")
          ->excludes(hold);
  sub->add_flag("--centrality", flags->centrality, "Also write the centrality at the pivot")
      ->excludes(hold);
  sub->add_flag("--checksums", flags->checksums, "Send a checksum with every piece");
  sub->add_flag("--skeleton-layers", flags->skeleton_layers,
                "Layer by layer, as a worker that cuts its prefill: skeleton rows alone past the "
                "pivot (--pivot online, fixed, profiled; fastkv)")
      ->excludes(saliency);
  sub->add_flag("--json", flags->json, "Print JSON");
  return {sub, [flags] { return RunCompress(*flags); }};
}

}  // namespace structkv::cli
