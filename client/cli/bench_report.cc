#include "client/cli/bench_report.h"

#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cli/geometry_text.h"
#include "client/cli/text.h"
#include "nlohmann/json.hpp"

namespace structkv::cli {
namespace {

double Percentile(std::vector<double>* values, double share) {
  if (values->empty()) return 0;
  std::sort(values->begin(), values->end());
  const auto rank =
      static_cast<size_t>(std::lround(share * static_cast<double>(values->size() - 1)));
  return (*values)[rank];
}

uint64_t PeakResidentBytes() {
  struct rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<uint64_t>(usage.ru_maxrss) << 10;
}

double Sum(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

double PerGigabyte(double seconds, uint64_t bytes) {
  return bytes == 0 ? 0 : seconds * 1e9 / static_cast<double>(bytes);
}

// Of prompts that run beside one another nobody can say which of them took the time.
bool KnowsCpu(const BenchFlags& flags) { return flags.concurrency == 1; }

std::string RateText(uint64_t bytes, double seconds) {
  return absl::StrCat(BytesText(static_cast<uint64_t>(static_cast<double>(bytes) / seconds)), "/s");
}

void PrintHoldText(const BenchFlags& flags, const BenchFigures& m) {
  const FetchFigures& fetches = m.fetches;
  std::printf("held        %s in of each prompt, fetched with %s of each (%s%s%s)\n",
              RateText(m.input_bytes, Sum(m.prompt_seconds)).c_str(),
              RateText(fetches.bytes, Sum(fetches.seconds)).c_str(), fetches.transport.c_str(),
              fetches.transport_reason.empty() ? "" : ": ", fetches.transport_reason.c_str());
  if (!KnowsCpu(flags)) return;
  std::printf("CPU         %.3f s/GB to hold, %.3f s/GB to fetch, of this process\n",
              PerGigabyte(m.hold_cpu_seconds, m.input_bytes),
              PerGigabyte(fetches.cpu_seconds, fetches.bytes));
}

// What is in a stream, where that is not a whole prompt.
std::string StreamsText(const BenchFlags& flags) {
  if (flags.shards > 1) return absl::StrCat("each of ", flags.shards, " ranks, ");
  if (flags.batch == 1) return "";
  const std::vector<uint32_t> tokens = BatchTokens(flags);
  return absl::StrCat("streams of ", flags.batch, ", of ",
                      CountText(*std::min_element(tokens.begin(), tokens.end())),
                      " tokens and more, ");
}

}  // namespace

void PrintBenchText(const BenchFlags& flags, const std::vector<BenchPrompt>& prompts,
                    const std::string& where, BenchFigures* m) {
  const v1::ModelGeometry& g = prompts[0].open.geometry();
  const v1::Opened& opened = prompts[0].opened;
  std::printf("%s, %s backend, %s%s%s\n", where.c_str(), m->backend.c_str(), m->transport.c_str(),
              m->transport_reason.empty() ? "" : ": ", m->transport_reason.c_str());
  std::printf("prompt      %u layers, %s, %s tokens, %s, %s%s\n", g.layer_count(),
              HeadsText(g).c_str(), CountText(flags.tokens).c_str(), flags.dtype.c_str(),
              MethodKind(opened.method()).c_str(),
              flags.plan            ? ", plan"
              : flags.hold          ? ", held"
              : flags.pull          ? ", pull"
              : opened.has_rotary() ? ", keys turned"
                                    : "");
  std::printf("run         %u prompts, %u at a time, %s%s\n", flags.prompts,
              std::min(flags.prompts, flags.concurrency * flags.batch), StreamsText(flags).c_str(),
              DurationText(absl::Seconds(m->wall_seconds)).c_str());
  std::printf(
      "throughput  %s/s in, %s/s out, %.2f prompts/s, %.1f layers/s\n",
      BytesText(static_cast<uint64_t>(static_cast<double>(m->input_bytes) / m->wall_seconds))
          .c_str(),
      BytesText(static_cast<uint64_t>(static_cast<double>(m->output_bytes) / m->wall_seconds))
          .c_str(),
      flags.prompts / m->wall_seconds,
      static_cast<double>(m->layer_seconds.size()) / m->wall_seconds);
  std::printf("bytes       %s in, %s out; %s reserved for a %s\n",
              BytesText(m->input_bytes).c_str(), BytesText(m->output_bytes).c_str(),
              BytesText(opened.reserved_bytes()).c_str(), flags.shards > 1 ? "rank" : "prompt");
  if (flags.hold) PrintHoldText(flags, *m);
  const auto per_layer = [&](uint64_t micros) {
    return DurationText(absl::Microseconds(micros) /
                        static_cast<double>(std::max<size_t>(1, m->layer_seconds.size())));
  };
  std::printf("service     %s computing and %s waiting for a thread, mean of a layer\n",
              per_layer(m->compute_micros).c_str(), per_layer(m->queue_micros).c_str());
  Table table({"latency", "p50", "p90", "p99", "max"});
  for (const auto& [name, values] :
       {std::pair("layer", &m->layer_seconds), std::pair("prompt", &m->prompt_seconds),
        std::pair("fetch", &m->fetches.seconds),
        std::pair("release", &m->fetches.release_seconds)}) {
    if (values->empty()) continue;
    std::vector<std::string> row = {name};
    for (double share : {0.5, 0.9, 0.99, 1.0}) {
      row.push_back(DurationText(absl::Seconds(Percentile(values, share))));
    }
    table.Add(std::move(row));
  }
  std::printf("\n%s\nA layer's latency runs from its first byte sent to its last byte received.\n",
              table.Text("  ").c_str());
}

void PrintBenchJson(const BenchFlags& flags, const std::vector<BenchPrompt>& prompts,
                    const std::string& where, BenchFigures* m) {
  const v1::ModelGeometry& g = prompts[0].open.geometry();
  const v1::Opened& opened = prompts[0].opened;
  uint64_t synthetic_bytes = 0;
  for (const BenchPrompt& prompt : prompts) synthetic_bytes += prompt.tensors->resident_bytes();
  nlohmann::ordered_json json;
  json["where"] = where;
  json["backend"] = m->backend;
  json["transport"] = m->transport;
  json["transport_reason"] = m->transport_reason;
  json["layers"] = g.layer_count();
  json["query_heads"] = g.query_head_count();
  json["kv_heads"] = g.kv_head_count();
  json["key_dim"] = g.key_dim();
  json["value_dim"] = g.value_dim();
  json["values_in_keys"] = g.values_in_keys();
  json["tokens"] = flags.tokens;
  json["dtype"] = flags.dtype;
  json["kv_scales"] = flags.kv_scales;
  json["block_tokens"] = flags.paged;
  for (const auto& [key, value] : MethodMetadata(opened.method())) json[key] = value;
  json["plan"] = flags.plan;
  json["rerotate"] = opened.has_rotary();
  json["pull"] = flags.pull;
  json["prompts"] = flags.prompts;
  json["concurrency"] = flags.concurrency;
  json["batch"] = flags.batch;
  json["batch_tokens"] = BatchTokens(flags);
  json["shards"] = flags.shards;
  json["seconds"] = m->wall_seconds;
  json["input_bytes"] = m->input_bytes;
  json["output_bytes"] = m->output_bytes;
  json["input_bytes_per_second"] = static_cast<double>(m->input_bytes) / m->wall_seconds;
  json["prompts_per_second"] = flags.prompts / m->wall_seconds;
  json["layers_per_second"] = static_cast<double>(m->layer_seconds.size()) / m->wall_seconds;
  json["reserved_bytes"] = opened.reserved_bytes();
  json["compute_micros"] = m->compute_micros;
  json["queue_micros"] = m->queue_micros;
  json["synthetic_bytes"] = synthetic_bytes;
  json["peak_resident_bytes"] = PeakResidentBytes();
  json["hold"] = flags.hold;
  if (flags.hold) {
    const FetchFigures& fetches = m->fetches;
    json["held_bytes_per_second"] = static_cast<double>(m->input_bytes) / Sum(m->prompt_seconds);
    json["fetch_transport"] = fetches.transport;
    json["fetch_transport_reason"] = fetches.transport_reason;
    json["fetch_bytes"] = fetches.bytes;
    json["fetch_bytes_per_second"] = static_cast<double>(fetches.bytes) / Sum(fetches.seconds);
    if (KnowsCpu(flags)) {
      json["hold_cpu_seconds_per_gb"] = PerGigabyte(m->hold_cpu_seconds, m->input_bytes);
      json["fetch_cpu_seconds_per_gb"] = PerGigabyte(fetches.cpu_seconds, fetches.bytes);
    }
  }
  for (const auto& [name, values] : {std::pair("layer_seconds", &m->layer_seconds),
                                     std::pair("prompt_seconds", &m->prompt_seconds),
                                     std::pair("fetch_seconds", &m->fetches.seconds),
                                     std::pair("release_seconds", &m->fetches.release_seconds)}) {
    if (values->empty()) continue;
    json[name] = {{"p50", Percentile(values, 0.5)},
                  {"p90", Percentile(values, 0.9)},
                  {"p99", Percentile(values, 0.99)},
                  {"max", Percentile(values, 1.0)}};
  }
  std::printf("%s\n", json.dump(2).c_str());
}

}  // namespace structkv::cli
