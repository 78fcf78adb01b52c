// A million tokens: 128 GiB of keys and values of Llama-3.1-8B's geometry, made up as they go,
// through a real server, in compaction mode, in plan mode, and as saliency alone. What the server
// holds of it, whether its positions are the reference's, and whether a token costs the same in
// prompts of every length; see --help.
#include <sys/resource.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "grpc/grpc.h"
#include "nlohmann/json.hpp"
#include "tests/bench/long_prompt_check.h"
#include "tests/bench/memory_stream.h"
#include "tests/bench/server_process.h"

namespace structkv::bench {
namespace {

constexpr double kMiB = 1 << 20;
// Of what a prompt reserves: what gRPC holds of a message that it still receives is not in it.
constexpr double kReservedBar = 1.05;
// Tokens at which the two backends may part: those whose scores agree to rounding.
constexpr double kRoundingBar = 1e-4;
// Cost of a token in a layer, of the dearest length over the cheapest.
constexpr double kFlatBar = 1.15;
// Streamed for each length in a round of the flatness table: whole prompts of at most 32 layers.
constexpr uint64_t kBytesPerLength = uint64_t{4} << 30;

struct Flags {
  uint32_t tokens = 1 << 20;
  uint32_t layers = 32;
  uint32_t layers_in_flight = 1;
  std::vector<std::string> modes = {"compact", "plan", "saliency"};
  std::vector<uint32_t> sampled = {0, 31};
  std::vector<uint32_t> lengths;
  std::string flat_mode = "compact";
  int rounds = 5;
  std::string memory_budget = "12GiB";
  std::string server = STRUCTKV_SERVER;
  bool json = false;
  bool check = false;
};

v1::Open MakeOpen(const Flags& flags, const std::string& mode, uint32_t layers, uint32_t tokens) {
  v1::Open open = LlamaOpen(layers, tokens);
  if (mode != "compact") open.set_output(v1::OUTPUT_PLAN);
  open.set_statistic(mode == "saliency" ? v1::STATISTIC_SALIENCY : v1::STATISTIC_WINDOW_QUERIES);
  open.set_layers_in_flight(std::min(flags.layers_in_flight, layers));
  return open;
}

StreamedPrompt Stream(const std::string& address, const v1::Open& open, const TensorSource& source,
                      const std::set<uint32_t>& sampled) {
  absl::StatusOr<StreamedPrompt> prompt = StreamPrompt(address, open, source, sampled);
  if (prompt.ok()) return *std::move(prompt);
  std::fprintf(stderr, "structkv_million_bench: %s\n", prompt.status().ToString().c_str());
  std::exit(1);
}

int64_t OwnPeakBytes() {
  struct rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} << 10;
}

// By statistic and layer: compaction and plan mode score the same tensors.
using Saliencies = std::map<std::pair<int, uint32_t>, std::vector<float>>;

// One prompt through a fresh server.
nlohmann::ordered_json MeasurePrompt(const Flags& flags, const TensorSource& source,
                                     const std::string& mode, Saliencies* saliencies) {
  const v1::Open open = MakeOpen(flags, mode, flags.layers, flags.tokens);
  std::set<uint32_t> sampled;
  for (const uint32_t layer : flags.sampled) sampled.insert(std::min(layer, flags.layers - 1));
  nlohmann::ordered_json run;
  StreamedPrompt prompt;
  {
    const ServerProcess server(flags.server, {"--memory-budget", flags.memory_budget});
    const int64_t idle = server.resident_bytes();
    const double before = server.cpu_seconds();
    prompt = Stream(server.address(), open, source, sampled);
    run = {
        {"mode", mode},
        {"tokens", flags.tokens},
        {"layers", flags.layers},
        {"layers_in_flight", prompt.opened.layers_in_flight()},
        {"input_bytes", prompt.summary.input_bytes()},
        {"output_bytes", prompt.summary.output_bytes()},
        {"seconds", prompt.seconds},
        {"server_cpu_seconds", server.cpu_seconds() - before},
        {"compute_seconds", static_cast<double>(prompt.summary.timing().compute_micros()) * 1e-6},
        {"layer_bytes", prompt.layer_bytes},
        {"idle_rss_bytes", idle},
        {"reserved_bytes", prompt.opened.reserved_bytes()},
        {"peak_rss_bytes", server.peak_resident_bytes()},
        {"client_peak_rss_bytes", OwnPeakBytes()},
        {"wrong_rows", prompt.wrong_rows}};
  }
  const double bar =
      run["idle_rss_bytes"].get<double>() + kReservedBar * run["reserved_bytes"].get<double>();
  bool passed = run["peak_rss_bytes"].get<double>() <= bar && prompt.wrong_rows == 0;
  for (const auto& [layer, positions] : prompt.positions) {
    const uint32_t window = prompt.opened.window_tokens();
    std::vector<float>& saliency = (*saliencies)[{open.statistic(), layer}];
    if (saliency.empty()) saliency = ReferenceSaliency(open, window, source, layer);
    const PositionCheck check = CheckPositions(saliency, window, positions);
    run["checked"].push_back({{"layer", layer},
                              {"kept", check.kept},
                              {"different", check.different},
                              {"farthest", check.farthest}});
    passed = passed && check.farthest <= kRoundingBar;
  }
  run["passed"] = passed;
  return run;
}

void PrintPrompt(const nlohmann::ordered_json& run) {
  const auto mib = [&run](const char* field) { return run[field].get<double>() / kMiB; };
  std::printf("%-9s %8.0f %8.1f %8.1f %8.1f %9.0f %9.0f %9.0f %9.0f %9.0f  %s\n",
              run["mode"].get<std::string>().c_str(), mib("input_bytes"),
              run["seconds"].get<double>(), run["server_cpu_seconds"].get<double>(),
              run["compute_seconds"].get<double>(), mib("layer_bytes"), mib("idle_rss_bytes"),
              mib("reserved_bytes"), mib("peak_rss_bytes"), mib("client_peak_rss_bytes"),
              run["passed"].get<bool>() ? "within its bars" : "MISSED");
  for (const nlohmann::ordered_json& check : run["checked"]) {
    std::printf("          layer %u: %ld positions, %ld not the reference's (scores within %.1e)\n",
                check["layer"].get<uint32_t>(), check["kept"].get<long>(),
                check["different"].get<long>(), check["farthest"].get<double>());
  }
  std::fflush(stdout);
}

struct Cost {
  uint32_t layers = 0;
  uint32_t prompts = 0;
  std::vector<double> cpu;   // nanoseconds of the server, per token and layer
  std::vector<double> wall;  // and of the clock
  double compute = 0;        // of these the arithmetic, in the last round
};

// Whatever else the machine does only adds to a cost.
double Lowest(const std::vector<double>& values) {
  return *std::min_element(values.begin(), values.end());
}

// Prompts of every length through one server, in turns.
nlohmann::ordered_json MeasureFlatness(const Flags& flags, const TensorSource& source) {
  // Few layers of the longest prompts are sent, so their first touch of the server's memory would
  // count for much: it is kept from prompt to prompt.
  const ServerProcess server(flags.server, {"--memory-budget", flags.memory_budget,
                                            "--idle-buffers", flags.memory_budget});
  std::map<uint32_t, Cost> costs;
  // The first round warms up.
  for (int round = 0; round <= flags.rounds; ++round) {
    for (const uint32_t tokens : flags.lengths) {
      Cost& cost = costs[tokens];
      const uint64_t layer_bytes = uint64_t{tokens} * 4096;
      const uint64_t layers = std::max<uint64_t>(kBytesPerLength / layer_bytes, 2);
      cost.layers = static_cast<uint32_t>(std::min<uint64_t>(layers, 32));
      cost.prompts = static_cast<uint32_t>(std::max<uint64_t>(layers / cost.layers, 1));
      const v1::Open open = MakeOpen(flags, flags.flat_mode, cost.layers, tokens);
      const double before = server.cpu_seconds();
      double seconds = 0;
      double compute = 0;
      for (uint32_t prompt = 0; prompt < cost.prompts; ++prompt) {
        const StreamedPrompt streamed = Stream(server.address(), open, source, {});
        seconds += streamed.seconds;
        compute += static_cast<double>(streamed.summary.timing().compute_micros()) * 1e-6;
      }
      if (round == 0) continue;
      const double units = 1e-9 * tokens * cost.layers * cost.prompts;
      cost.cpu.push_back((server.cpu_seconds() - before) / units);
      cost.wall.push_back(seconds / units);
      cost.compute = compute / units;
    }
  }
  nlohmann::ordered_json report;
  std::vector<double> lowest;
  for (const auto& [tokens, cost] : costs) {
    lowest.push_back(Lowest(cost.cpu));
    report["lengths"].push_back({{"tokens", tokens},
                                 {"layers", cost.layers},
                                 {"prompts", cost.prompts},
                                 {"cpu_nanos", lowest.back()},
                                 {"cpu_nanos_of_rounds", cost.cpu},
                                 {"wall_nanos", Lowest(cost.wall)},
                                 {"compute_nanos", cost.compute}});
  }
  const auto [least, most] = std::minmax_element(lowest.begin(), lowest.end());
  report["mode"] = flags.flat_mode;
  report["layers_in_flight"] = flags.layers_in_flight;
  report["spread"] = *most / *least;
  report["bar"] = kFlatBar;
  report["passed"] = *most / *least <= kFlatBar;
  return report;
}

void PrintFlatness(const nlohmann::ordered_json& report) {
  std::printf(
      "%s; nanoseconds per token and layer, lowest of the rounds\n%9s %7s %8s %10s %8s %8s\n",
      report["mode"].get<std::string>().c_str(), "tokens", "layers", "prompts", "server CPU",
      "wall", "compute");
  for (const nlohmann::ordered_json& length : report["lengths"]) {
    std::printf("%9u %7u %8u %10.0f %8.0f %8.0f\n", length["tokens"].get<uint32_t>(),
                length["layers"].get<uint32_t>(), length["prompts"].get<uint32_t>(),
                length["cpu_nanos"].get<double>(), length["wall_nanos"].get<double>(),
                length["compute_nanos"].get<double>());
  }
  std::printf("dearest over cheapest: %.2f (bar %.2f)\n", report["spread"].get<double>(), kFlatBar);
}

int Run(const Flags& flags) {
  const TensorSource source;
  nlohmann::ordered_json report;
  bool passed = true;
  Saliencies saliencies;
  if (flags.lengths.empty()) {
    if (!flags.json) {
      std::printf(
          "%u layers of %u tokens; MiB and seconds\n%-9s %8s %8s %8s %8s %9s %9s %9s %9s %9s\n",
          flags.layers, flags.tokens, "mode", "prompt", "wall", "CPU", "compute", "a layer",
          "idle RSS", "reserved", "peak RSS", "client's");
    }
    for (const std::string& mode : flags.modes) {
      const nlohmann::ordered_json run = MeasurePrompt(flags, source, mode, &saliencies);
      if (!flags.json) PrintPrompt(run);
      passed = passed && run["passed"].get<bool>();
      report["prompts"].push_back(run);
    }
  } else {
    report["flatness"] = MeasureFlatness(flags, source);
    if (!flags.json) PrintFlatness(report["flatness"]);
    passed = report["flatness"]["passed"].get<bool>();
  }
  if (flags.json) std::printf("%s\n", report.dump(2).c_str());
  return flags.check && !passed ? 1 : 0;
}

int Main(int argc, char** argv) {
  grpc_init();  // once more than gRPC does itself: its last shutdown could hang at exit
  Flags flags;
  CLI::App app("Streams prompts of a million tokens of Llama-3.1-8B through structkv-server",
               "structkv_million_bench");
  const auto modes = CLI::IsMember({"compact", "plan", "saliency"});
  app.add_option("--tokens", flags.tokens, "Prompt length")->capture_default_str();
  app.add_option("--layers", flags.layers, "Layers")
      ->check(CLI::Range(1, 512))
      ->capture_default_str();
  app.add_option("--layers-in-flight", flags.layers_in_flight, "Layers that may be unfinished")
      ->check(CLI::Range(1, 512))
      ->capture_default_str();
  app.add_option("--modes", flags.modes,
                 "compact: keys, values and queries in, the compacted cache out; plan: keys and "
                 "queries in, positions out; saliency: saliency in, positions out")
      ->delimiter(',')
      ->check(modes)
      ->capture_default_str();
  app.add_option("--sampled", flags.sampled, "Layers whose answers are computed again")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--flat", flags.lengths,
                 "In place of all this: the cost of a token in prompts of these lengths")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 20));
  app.add_option("--flat-mode", flags.flat_mode, "Mode of --flat")
      ->check(modes)
      ->capture_default_str();
  app.add_option("--rounds", flags.rounds, "Rounds of --flat, after one that warms up")
      ->check(CLI::Range(1, 100))
      ->capture_default_str();
  app.add_option("--memory-budget", flags.memory_budget, "The server's")->capture_default_str();
  app.add_option("--server", flags.server, "The server program")->capture_default_str();
  app.add_flag("--json", flags.json, "Print JSON");
  app.add_flag("--check", flags.check, "Fail where a bar is missed");
  CLI11_PARSE(app, argc, argv);
  return Run(flags);
}

}  // namespace
}  // namespace structkv::bench

int main(int argc, char** argv) { return structkv::bench::Main(argc, argv); }
