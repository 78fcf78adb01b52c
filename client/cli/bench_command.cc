#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/types/span.h"
#include "client/cli/bytes_table.h"
#include "client/cli/commands.h"
#include "client/cli/compressor.h"
#include "client/cli/geometry_text.h"
#include "client/cli/method_flags.h"
#include "client/cli/rotary_flags.h"
#include "client/cli/synthetic.h"
#include "client/cli/text.h"
#include "nlohmann/json.hpp"

namespace structkv::cli {
namespace {

struct BenchFlags {
  std::string geometry = "llama-3.1-8b";
  std::optional<uint32_t> layers, query_heads, kv_heads, dim, value_dim;
  uint32_t tokens = 8192;
  bool values_in_keys = false;
  uint32_t paged = 0;
  std::optional<double> attention_scale;
  std::string dtype = "bf16";
  std::string kv_scales = "none";
  std::string layout = "head-token-dim";
  std::string statistic = "window-queries";
  MethodFlags method;
  RotaryFlags rotary;
  ConnectionFlags connection;
  uint32_t prompts = 4;
  uint32_t concurrency = 1;
  uint32_t shards = 1;
  uint32_t layers_in_flight = 0;
  uint32_t chunk_kib = 2048;
  uint64_t seed = 1;
  bool plan = false;
  bool pull = false;
  bool bytes = false;
  bool checksums = false;
  bool json = false;
};

// What the prompts of a run have measured. Guarded by `mutex` while they run.
struct Measured {
  absl::Mutex mutex;
  std::vector<double> prompt_seconds;
  std::vector<double> layer_seconds;
  uint64_t input_bytes = 0;
  uint64_t output_bytes = 0;
  uint64_t compute_micros = 0;
  uint64_t queue_micros = 0;
  std::string backend;
  absl::Status status;
  double wall_seconds = 0;
};

// Memory for results, used over and over: a result is dropped before the next one arrives.
class Scratch {
 public:
  client::Bytes Get(v1::Tensor tensor, size_t size) {
    std::vector<std::byte>& memory = memory_[tensor];
    if (memory.size() < size) memory.resize(size);
    return {memory.data(), size, nullptr};
  }

 private:
  std::map<int, std::vector<std::byte>> memory_;
};

absl::StatusOr<v1::Open> MakeOpen(const BenchFlags& flags) {
  absl::StatusOr<KnownModel> known = ModelByName(flags.geometry);
  if (!known.ok()) return known.status();
  v1::ModelGeometry* geometry = &known->geometry;
  if (flags.layers) geometry->set_layer_count(*flags.layers);
  if (flags.query_heads) geometry->set_query_head_count(*flags.query_heads);
  if (flags.kv_heads) geometry->set_kv_head_count(*flags.kv_heads);
  if (flags.dim) {
    geometry->set_key_dim(*flags.dim);
    geometry->set_value_dim(*flags.dim);
  }
  if (flags.value_dim) geometry->set_value_dim(*flags.value_dim);
  if (flags.values_in_keys) geometry->set_values_in_keys(true);
  absl::StatusOr<v1::Method> method = BuildMethod(flags.method);
  if (!method.ok()) return method.status();
  v1::Open open;
  *open.mutable_geometry() = *geometry;
  if (known->attention_scale) open.set_attention_scale(*known->attention_scale);
  if (flags.attention_scale) open.set_attention_scale(*flags.attention_scale);
  *open.mutable_method() = *std::move(method);
  open.set_prompt_tokens(flags.tokens);
  open.set_dtype(flags.dtype == "f32"       ? v1::DTYPE_F32
                 : flags.dtype == "f16"     ? v1::DTYPE_F16
                 : flags.dtype == "f8-e4m3" ? v1::DTYPE_F8_E4M3
                 : flags.dtype == "f8-e5m2" ? v1::DTYPE_F8_E5M2
                                            : v1::DTYPE_BF16);
  if (flags.kv_scales != "none") {
    open.set_kv_scales(flags.kv_scales == "per-tensor" ? v1::KV_SCALES_PER_TENSOR
                                                       : v1::KV_SCALES_PER_KV_HEAD);
  }
  open.set_layout(flags.layout == "token-head-dim" ? v1::LAYOUT_TOKEN_HEAD_DIM
                                                   : v1::LAYOUT_HEAD_TOKEN_DIM);
  if (flags.paged != 0) PageAtRandom(flags.paged, flags.seed, &open);
  if (open.method().has_h2o()) {
    open.set_statistic(flags.statistic == "saliency" ? v1::STATISTIC_SALIENCY
                                                     : v1::STATISTIC_SALIENCY_PER_KV_HEAD);
  } else if (!open.method().has_streaming_llm() && !open.method().has_full()) {
    open.set_statistic(flags.statistic == "saliency" ? v1::STATISTIC_SALIENCY
                       : flags.statistic == "saliency-per-kv-head"
                           ? v1::STATISTIC_SALIENCY_PER_KV_HEAD
                           : v1::STATISTIC_WINDOW_QUERIES);
  }
  open.set_output(flags.plan || open.method().has_gemfilter() ? v1::OUTPUT_PLAN
                                                              : v1::OUTPUT_COMPACT);
  SetRotary(flags.rotary, /*metadata=*/{}, &open);
  if (flags.pull) {
    open.set_pull(open.statistic() == v1::STATISTIC_WINDOW_QUERIES ? v1::PULL_VALUES
                                                                   : v1::PULL_KEYS_AND_VALUES);
  }
  open.set_layers_in_flight(flags.layers_in_flight);
  open.set_model_id(absl::StrCat("bench/", flags.geometry));
  return open;
}

// What the service answers to `open`, without sending it anything.
absl::StatusOr<v1::Opened> Probe(Compressor& compressor, const v1::Open& open,
                                 client::SessionOptions options) {
  std::optional<v1::Opened> opened;
  options.on_opened = [&opened](const v1::Opened& o) { opened = o; };
  options.on_event = [](const client::Event&) {};
  const auto source = [](uint32_t) -> absl::StatusOr<client::LayerTensors> {
    return absl::CancelledError("probe");
  };
  const absl::StatusOr<v1::Summary> summary = compressor.Run(open, source, options);
  if (!opened.has_value()) return summary.status();
  return *std::move(opened);
}

// What one rank sends.
struct Rank {
  v1::Open open;
  std::unique_ptr<SyntheticPrompt> prompt;
};

// `open` of a rank; of one rank alone, `open`.
v1::Open RankOpen(v1::Open open, uint32_t ranks, uint32_t index, const std::string& group) {
  if (ranks == 1) return open;
  open.mutable_shard_group()->set_group_id(group);
  open.mutable_shard_group()->set_shard_count(ranks);
  open.mutable_shard_group()->set_shard_index(index);
  return open;
}

// Runs one prompt, or a rank's part of it, and adds its figures: bytes, and, of the first rank
// alone, times.
absl::Status RunPrompt(Compressor& compressor, const v1::Open& open, const SyntheticPrompt& prompt,
                       client::SessionOptions options, std::atomic<uint64_t>* layers_done,
                       Measured* measured, bool first_rank) {
  const uint32_t layers = open.geometry().layer_count();
  // Sent by one thread, answered on another: atomic, so that the two need no lock.
  std::vector<std::atomic<int64_t>> sent(layers);
  std::vector<double> latencies;
  latencies.reserve(layers);
  options.on_event = [&](const client::Event& event) {
    const auto* layer = std::get_if<client::LayerResult>(&event);
    if (layer == nullptr) return;
    latencies.push_back(
        static_cast<double>(absl::GetCurrentTimeNanos() - sent[layer->layer].load()) * 1e-9);
    if (first_rank) layers_done->fetch_add(1);
  };
  const auto source = [&](uint32_t layer) -> absl::StatusOr<client::LayerTensors> {
    sent[layer].store(absl::GetCurrentTimeNanos());
    return prompt.Layer(layer);
  };
  const absl::Time start = absl::Now();
  absl::StatusOr<v1::Summary> summary = compressor.Run(open, source, options);
  if (!summary.ok()) return summary.status();
  const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
  absl::MutexLock lock(&measured->mutex);
  measured->input_bytes += summary->input_bytes();
  measured->output_bytes += summary->output_bytes();
  if (!first_rank) return absl::OkStatus();
  measured->prompt_seconds.push_back(seconds);
  measured->layer_seconds.insert(measured->layer_seconds.end(), latencies.begin(), latencies.end());
  measured->compute_micros += summary->timing().compute_micros();
  measured->queue_micros += summary->timing().queue_micros();
  measured->backend = summary->backend();
  return absl::OkStatus();
}

// Runs the ranks of one prompt together, each on a thread and a connection of its own.
absl::Status RunRanks(absl::Span<const std::unique_ptr<Compressor>> compressors,
                      const std::vector<Rank>& ranks,
                      const std::vector<client::SessionOptions>& options, const std::string& group,
                      std::atomic<uint64_t>* layers_done, Measured* measured) {
  const auto count = static_cast<uint32_t>(ranks.size());
  std::vector<absl::Status> statuses(count);
  const auto run = [&](uint32_t i) {
    statuses[i] = RunPrompt(*compressors[i], RankOpen(ranks[i].open, count, i, group),
                            *ranks[i].prompt, options[i], layers_done, measured, i == 0);
  };
  std::vector<std::thread> threads;
  for (uint32_t i = 1; i < count; ++i) threads.emplace_back(run, i);
  run(0);
  for (std::thread& thread : threads) thread.join();
  absl::Status worst;
  for (const absl::Status& status : statuses) {
    // The rank at fault says why.
    if (worst.ok() || absl::IsAborted(worst)) worst = status.ok() ? worst : status;
  }
  return worst;
}

// Takes prompts off the counter until none is left or one has failed.
void Work(const BenchFlags& flags, absl::Span<const std::unique_ptr<Compressor>> compressors,
          const std::vector<Rank>& ranks, std::atomic<uint32_t>* next,
          std::atomic<uint64_t>* layers_done, Measured* measured) {
  std::vector<Scratch> scratch(ranks.size());
  std::vector<client::SessionOptions> options(ranks.size(), MakeSessionOptions(flags.connection));
  for (size_t i = 0; i < ranks.size(); ++i) {
    options[i].checksums = flags.checksums;
    options[i].chunk_bytes = size_t{flags.chunk_kib} << 10;
    options[i].allocate = [own = &scratch[i]](uint32_t, v1::Tensor tensor, size_t size) {
      return own->Get(tensor, size);
    };
  }
  while (next->fetch_add(1) < flags.prompts) {
    const std::string group = absl::StrCat("bench-", absl::GetCurrentTimeNanos(), "-",
                                           reinterpret_cast<uintptr_t>(&options));
    absl::Status status = RunRanks(compressors, ranks, options, group, layers_done, measured);
    if (status.ok()) continue;
    absl::MutexLock lock(&measured->mutex);
    measured->status.Update(status);
    next->store(flags.prompts);
  }
}

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

void PrintText(const BenchFlags& flags, const v1::Open& open, const v1::Opened& opened,
               const std::string& where, Measured* m) {
  const v1::ModelGeometry& g = open.geometry();
  std::printf("%s, %s backend\n", where.c_str(), m->backend.c_str());
  std::printf("prompt      %u layers, %s, %s tokens, %s, %s%s\n", g.layer_count(),
              HeadsText(g).c_str(), CountText(flags.tokens).c_str(), flags.dtype.c_str(),
              MethodKind(opened.method()).c_str(),
              flags.plan            ? ", plan"
              : flags.pull          ? ", pull"
              : opened.has_rotary() ? ", keys turned"
                                    : "");
  std::printf("run         %u prompts, %u at a time, %s%s\n", flags.prompts, flags.concurrency,
              flags.shards > 1 ? absl::StrCat("each of ", flags.shards, " ranks, ").c_str() : "",
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
  const auto per_layer = [&](uint64_t micros) {
    return DurationText(absl::Microseconds(micros) /
                        static_cast<double>(std::max<size_t>(1, m->layer_seconds.size())));
  };
  std::printf("service     %s computing and %s waiting for a thread, mean of a layer\n",
              per_layer(m->compute_micros).c_str(), per_layer(m->queue_micros).c_str());
  Table table({"latency", "p50", "p90", "p99", "max"});
  for (const auto& [name, values] :
       {std::pair("layer", &m->layer_seconds), std::pair("prompt", &m->prompt_seconds)}) {
    std::vector<std::string> row = {name};
    for (double share : {0.5, 0.9, 0.99, 1.0}) {
      row.push_back(DurationText(absl::Seconds(Percentile(values, share))));
    }
    table.Add(std::move(row));
  }
  std::printf("\n%s\nA layer's latency runs from its first byte sent to its last byte received.\n",
              table.Text("  ").c_str());
}

void PrintJson(const BenchFlags& flags, const v1::Open& open, const v1::Opened& opened,
               const std::string& where, uint64_t synthetic_bytes, Measured* m) {
  const v1::ModelGeometry& g = open.geometry();
  nlohmann::ordered_json json;
  json["where"] = where;
  json["backend"] = m->backend;
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
  for (const auto& [name, values] : {std::pair("layer_seconds", &m->layer_seconds),
                                     std::pair("prompt_seconds", &m->prompt_seconds)}) {
    json[name] = {{"p50", Percentile(values, 0.5)},
                  {"p90", Percentile(values, 0.9)},
                  {"p99", Percentile(values, 0.99)},
                  {"max", Percentile(values, 1.0)}};
  }
  std::printf("%s\n", json.dump(2).c_str());
}

absl::Status RunBench(const BenchFlags& flags) {
  if (flags.bytes) {
    absl::StatusOr<std::string> table = BytesTable(flags.geometry);
    if (table.ok()) std::printf("%s", table->c_str());
    return table.status();
  }
  absl::StatusOr<v1::Open> open = MakeOpen(flags);
  if (!open.ok()) return open.status();
  if (flags.connection.in_process && flags.shards > 1) {
    return absl::InvalidArgumentError("--shards needs a server: each rank is a stream of its own");
  }
  // One connection for each worker and rank; the engine in this process is shared.
  std::vector<std::unique_ptr<Compressor>> compressors;
  const uint32_t connections = flags.connection.in_process ? 1 : flags.concurrency * flags.shards;
  for (uint32_t i = 0; i < connections; ++i) {
    absl::StatusOr<std::unique_ptr<Compressor>> made = MakeCompressor(flags.connection);
    if (!made.ok()) return made.status();
    compressors.push_back(*std::move(made));
  }
  absl::StatusOr<v1::Opened> opened =
      Probe(*compressors[0],
            RankOpen(*open, flags.shards, 0, absl::StrCat("probe-", absl::GetCurrentTimeNanos())),
            MakeSessionOptions(flags.connection));
  if (!opened.ok()) return opened.status();
  std::vector<Rank> ranks;
  uint64_t synthetic_bytes = 0;
  for (uint32_t i = 0; i < flags.shards; ++i) {
    Rank& rank = ranks.emplace_back();
    rank.open = RankOpen(*open, flags.shards, i, "");
    rank.prompt = std::make_unique<SyntheticPrompt>(rank.open, WithPulledTensors(*open, *opened),
                                                    flags.seed + i);
    synthetic_bytes += rank.prompt->resident_bytes();
  }

  Measured measured;
  std::atomic<uint32_t> next{0};
  std::atomic<uint64_t> layers_done{0};
  std::atomic<uint32_t> running{flags.concurrency};
  std::atomic<int64_t> finished{0};  // of the last worker, so that the display costs nothing
  const absl::Time start = absl::Now();
  std::vector<std::thread> workers;
  for (uint32_t i = 0; i < flags.concurrency; ++i) {
    workers.emplace_back([&, i] {
      Work(flags,
           absl::MakeConstSpan(compressors).subspan(i * flags.shards % connections, flags.shards),
           ranks, &next, &layers_done, &measured);
      finished.store(absl::GetCurrentTimeNanos());
      running.fetch_sub(1);
    });
  }
  Progress progress("benchmarking");
  const uint64_t total = uint64_t{flags.prompts} * open->geometry().layer_count();
  while (running.load() > 0) {
    progress.Update(layers_done.load(), total, "layers");
    absl::SleepFor(absl::Milliseconds(2));
  }
  for (std::thread& worker : workers) worker.join();
  measured.wall_seconds = absl::ToDoubleSeconds(absl::FromUnixNanos(finished.load()) - start);
  progress.Clear();
  if (!measured.status.ok()) return measured.status;
  const std::string where = compressors[0]->description();
  if (flags.json) {
    PrintJson(flags, *open, *opened, where, synthetic_bytes, &measured);
  } else {
    PrintText(flags, *open, *opened, where, &measured);
  }
  return absl::OkStatus();
}

}  // namespace

Command AddBench(CLI::App* app) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* sub = app->add_subcommand("bench", "Measure with synthetic prompts of any geometry");
  constexpr char kPrompt[] = "Prompt";
  constexpr char kRun[] = "Run";
  sub->add_option("--geometry", flags->geometry, "A known model's")
      ->check(CLI::IsMember(GeometryNames()))
      ->capture_default_str()
      ->group(kPrompt);
  sub->add_option("--layers", flags->layers, "In place of the geometry's")->group(kPrompt);
  sub->add_option("--query-heads", flags->query_heads, "Likewise")->group(kPrompt);
  sub->add_option("--kv-heads", flags->kv_heads, "Likewise")->group(kPrompt);
  sub->add_option("--dim", flags->dim, "Head size of keys and values, likewise")->group(kPrompt);
  sub->add_option("--value-dim", flags->value_dim, "Head size of values, likewise")->group(kPrompt);
  sub->add_flag("--values-in-keys", flags->values_in_keys,
                "Values are the first elements of the keys, as in MLA")
      ->group(kPrompt);
  sub->add_option("--attention-scale", flags->attention_scale,
                  "Factor of the scores, in place of the geometry's")
      ->group(kPrompt);
  sub->add_option("--tokens", flags->tokens, "Prompt length")
      ->capture_default_str()
      ->group(kPrompt);
  sub->add_option("--dtype", flags->dtype,
                  "bf16, f16, f32, f8-e4m3 or f8-e5m2; fp8 has queries of bf16")
      ->check(CLI::IsMember({"bf16", "f16", "f32", "f8-e4m3", "f8-e5m2"}))
      ->capture_default_str()
      ->group(kPrompt);
  sub->add_option("--kv-scales", flags->kv_scales, "Of fp8: none, per-tensor or per-kv-head")
      ->check(CLI::IsMember({"none", "per-tensor", "per-kv-head"}))
      ->capture_default_str()
      ->group(kPrompt);
  sub->add_option("--layout", flags->layout, "head-token-dim or token-head-dim")
      ->check(CLI::IsMember({"head-token-dim", "token-head-dim"}))
      ->capture_default_str()
      ->group(kPrompt);
  sub->add_option("--paged", flags->paged,
                  "Tokens of a block: keys and values lie in blocks, in random order; 0: they are "
                  "dense")
      ->capture_default_str()
      ->group(kPrompt);
  sub->add_option("--statistic", flags->statistic,
                  "What is sent for scoring: window-queries, saliency or saliency-per-kv-head")
      ->check(CLI::IsMember({"window-queries", "saliency", "saliency-per-kv-head"}))
      ->capture_default_str()
      ->group(kPrompt);
  CLI::Option* plan = sub->add_flag("--plan", flags->plan, "Positions only")->group(kPrompt);
  sub->add_flag("--pull", flags->pull,
                "Send only the rows of values that the service asks for; with saliency also those "
                "of keys")
      ->excludes(plan)
      ->group(kPrompt);
  sub->add_flag("--bytes", flags->bytes,
                "Print what each mode moves for this geometry, and measure nothing")
      ->group(kPrompt);
  sub->add_option("--seed", flags->seed, "Seed of the random tensors")
      ->capture_default_str()
      ->group(kPrompt);
  sub->add_option("--prompts", flags->prompts, "Prompts in all")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str()
      ->group(kRun);
  sub->add_option("--concurrency", flags->concurrency, "Prompts at a time")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str()
      ->group(kRun);
  sub->add_option("--shards", flags->shards,
                  "Tensor-parallel ranks of each prompt, each a stream of its own")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str()
      ->group(kRun);
  sub->add_option("--layers-in-flight", flags->layers_in_flight,
                  "Layers that may be unfinished at once; 0: the service's default")
      ->capture_default_str()
      ->group(kRun);
  sub->add_option("--chunk-kib", flags->chunk_kib, "Tensor bytes per message, KiB")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str()
      ->group(kRun);
  sub->add_flag("--checksums", flags->checksums, "Send a checksum with every piece")->group(kRun);
  AddMethodFlags(sub, &flags->method);
  AddRotaryFlags(sub, &flags->rotary);
  AddConnectionFlags(sub, &flags->connection);
  sub->add_flag("--json", flags->json, "Print JSON");
  return {sub, [flags] { return RunBench(*flags); }};
}

}  // namespace structkv::cli
