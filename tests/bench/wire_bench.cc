// How much Compress adds to a bare gRPC byte stream, in throughput and in latency. Both servers are
// processes of their own; both clients are the same code. See --help.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "CLI/CLI.hpp"
#include "grpc/grpc.h"
#include "nlohmann/json.hpp"
#include "tests/bench/wire_arithmetic.h"
#include "tests/bench/wire_bare.h"
#include "tests/bench/wire_copies.h"
#include "tests/bench/wire_hold.h"
#include "tests/bench/wire_peer.h"
#include "tests/bench/wire_plan.h"
#include "tests/bench/wire_round_trip.h"
#include "tests/bench/wire_servers.h"
#include "tests/bench/wire_stream.h"
#include "tests/bench/wire_transports.h"

namespace structkv::bench {
namespace {

// Programs that count copies, where they are built.
#ifndef STRUCTKV_WIRE_COUNT
#define STRUCTKV_WIRE_COUNT ""
#define STRUCTKV_COUNTING_SERVER ""
#endif

constexpr double kThroughputBar = 0.85;   // of the bare stream's rate
constexpr double kLatencyBarMicros = 50;  // above the bare round trip and the arithmetic
constexpr double kPlanBarMicros = 1000;   // of a layer in plan mode, above the arithmetic
constexpr uint32_t kPlanTokens = 131072;

struct Flags {
  StreamOptions stream;
  double gib = 1;
  double chunk_mib = 4;
  int repeats = 5;
  int holds = 0;
  int stripes = 0;
  int prompts = 6;
  uint32_t tokens = 16384;  // 64 KiB of saliency
  int plan_prompts = 0;
  TransportOptions transports;
  uint32_t plan_piece_kib = 2048;  // as the client library sends
  std::string server = STRUCTKV_SERVER;
  std::string backend = "auto";
  std::string count_program = STRUCTKV_WIRE_COUNT;  // empty: copies are not counted
  std::string count_server = STRUCTKV_COUNTING_SERVER;
  std::string channel;
  std::string serve_bare;
  bool json = false;
  bool check = false;
};

nlohmann::json MeasureStreams(const Flags& flags, const std::string& name, const std::string& bare,
                              const std::string& compress) {
  // One round to warm up, then in turns, so that both see the same machine; the best of each
  // counts.
  double bare_seconds = 0;
  double compress_seconds = 0;
  std::vector<double> ratios;
  for (int i = 0; i <= flags.repeats; ++i) {
    const double b = BareStreamSeconds(bare, flags.stream);
    const double c = CompressStreamSeconds(compress, flags.stream);
    if (i == 0) continue;
    ratios.push_back(b / c);
    bare_seconds = i == 1 ? b : std::min(bare_seconds, b);
    compress_seconds = i == 1 ? c : std::min(compress_seconds, c);
  }
  std::sort(ratios.begin(), ratios.end());
  const auto bytes = static_cast<double>(flags.stream.total_bytes);
  return {{"socket", name},
          {"bytes_each_way", flags.stream.total_bytes},
          {"chunk_bytes", flags.stream.chunk_bytes},
          {"bare_gb_per_s", bytes / bare_seconds / 1e9},
          {"compress_gb_per_s", bytes / compress_seconds / 1e9},
          {"ratio", bare_seconds / compress_seconds},
          {"median_ratio_of_pairs", ratios[ratios.size() / 2]},
          {"bar", kThroughputBar}};
}

// As many bytes in all, by several streams at once, each on a connection of its own.
double StripedSeconds(int stripes, const StreamOptions& options,
                      double (*run)(const std::string&, const StreamOptions&),
                      const std::string& address) {
  StreamOptions part = options;
  part.total_bytes /= static_cast<uint64_t>(stripes);
  std::vector<std::thread> threads;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < stripes; ++i) threads.emplace_back([&] { run(address, part); });
  for (std::thread& thread : threads) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Whether several connections carry more than one: prompts that run beside one another.
nlohmann::json MeasureStripes(const Flags& flags, const std::string& name, const std::string& bare,
                              const std::string& compress) {
  nlohmann::json rows;
  for (const int stripes : {1, 2, 4}) {
    std::vector<double> seconds[2];
    std::vector<double> gains[2];
    for (int i = 0; i <= flags.stripes; ++i) {
      const double once[2] = {StripedSeconds(1, flags.stream, BareStreamSeconds, bare),
                              StripedSeconds(1, flags.stream, CompressStreamSeconds, compress)};
      const double now[2] = {
          StripedSeconds(stripes, flags.stream, BareStreamSeconds, bare),
          StripedSeconds(stripes, flags.stream, CompressStreamSeconds, compress)};
      if (i == 0) continue;
      for (const int kind : {0, 1}) {
        seconds[kind].push_back(now[kind]);
        gains[kind].push_back(once[kind] / now[kind]);
      }
    }
    const auto bytes = static_cast<double>(flags.stream.total_bytes);
    nlohmann::json row = {{"socket", name}, {"connections", stripes}};
    for (const int kind : {0, 1}) {
      std::sort(gains[kind].begin(), gains[kind].end());
      row[kind == 0 ? "bare" : "compress"] = {
          {"gb_per_s", bytes / *std::min_element(seconds[kind].begin(), seconds[kind].end()) / 1e9},
          {"median_gain_of_pairs", gains[kind][gains[kind].size() / 2]}};
    }
    rows.push_back(row);
  }
  return rows;
}

void PrintStripes(const nlohmann::json& rows) {
  for (const nlohmann::json& row : rows) {
    std::printf("%-5s %d connections", row["socket"].get<std::string>().c_str(),
                row["connections"].get<int>());
    for (const char* kind : {"bare", "compress"}) {
      std::printf("  %s %.2f GB/s, %.2f times one", kind, row[kind]["gb_per_s"].get<double>(),
                  row[kind]["median_gain_of_pairs"].get<double>());
    }
    std::printf("\n");
  }
}

nlohmann::json ToJson(const RoundTrip& trip) {
  return {{"p50_micros", trip.p50_micros}, {"p99_micros", trip.p99_micros}};
}

nlohmann::json MeasureLatency(const Flags& flags, const std::string& name, const std::string& bare,
                              const std::string& compress) {
  const RoundTrips trips = MeasureRoundTrips(bare, compress, flags.tokens, flags.prompts);
  const RoundTrip arithmetic = MeasureArithmetic(flags.tokens, 2000);
  return {{"socket", name},
          {"request_bytes", trips.request_bytes},
          {"answer_bytes", trips.answer_bytes},
          {"compress", ToJson(trips.compress)},
          {"bare", ToJson(trips.bare)},
          {"computing", ToJson(trips.computing)},
          {"echo", ToJson(trips.echo)},
          {"arithmetic", ToJson(arithmetic)},
          {"added_p50_micros", trips.compress.p50_micros - trips.computing.p50_micros},
          {"added_to_sum_p50_micros",
           trips.compress.p50_micros - trips.bare.p50_micros - arithmetic.p50_micros},
          {"added_to_echo_p50_micros",
           trips.compress.p50_micros - trips.echo.p50_micros - arithmetic.p50_micros},
          {"bar_micros", kLatencyBarMicros}};
}

void PrintStreams(const nlohmann::json& result) {
  std::printf(
      "%-5s %6.2f GB/s bare  %6.2f GB/s Compress  ratio %.3f (median of pairs %.3f; bar %.2f)\n",
      result["socket"].get<std::string>().c_str(), result["bare_gb_per_s"].get<double>(),
      result["compress_gb_per_s"].get<double>(), result["ratio"].get<double>(),
      result["median_ratio_of_pairs"].get<double>(), kThroughputBar);
}

void PrintLatency(const nlohmann::json& result) {
  std::printf("%-5s round trip of %llu bytes and an answer of %llu, microseconds, p50 / p99\n",
              result["socket"].get<std::string>().c_str(),
              result["request_bytes"].get<unsigned long long>(),
              result["answer_bytes"].get<unsigned long long>());
  for (const char* row : {"compress", "computing", "bare", "echo", "arithmetic"}) {
    std::printf("      %-11s %7.1f / %7.1f\n", row, result[row]["p50_micros"].get<double>(),
                result[row]["p99_micros"].get<double>());
  }
  std::printf(
      "      added, p50: %.1f to the bare service that computes (bar %.0f), %.1f to the bare one "
      "and the arithmetic, %.1f to the echo and the arithmetic\n",
      result["added_p50_micros"].get<double>(), kLatencyBarMicros,
      result["added_to_sum_p50_micros"].get<double>(),
      result["added_to_echo_p50_micros"].get<double>());
}

nlohmann::json MeasurePlanMode(const Flags& flags, const std::string& name, const PlanCase& plan,
                               const std::string& bare, const std::string& compress) {
  const PlanTimes times = MeasurePlan(plan, bare, compress, kPlanTokens, flags.plan_prompts,
                                      uint64_t{flags.plan_piece_kib} << 10);
  return {{"socket", name},
          {"case", plan.name},
          {"tokens", kPlanTokens},
          {"request_bytes", times.request_bytes},
          {"answer_bytes", times.answer_bytes},
          {"compress", ToJson(times.compress)},
          {"arithmetic", ToJson(times.arithmetic)},
          {"bare", ToJson(times.bare)},
          {"echo", ToJson(times.echo)},
          {"beyond_arithmetic_p50_micros", times.compress.p50_micros - times.arithmetic.p50_micros},
          {"beyond_arithmetic_p99_micros", times.compress.p99_micros - times.arithmetic.p99_micros},
          {"bar_micros", kPlanBarMicros}};
}

void PrintPlan(const nlohmann::json& result) {
  std::printf("%-5s plan of %u tokens, %s: microseconds of a layer, p50 / p99\n",
              result["socket"].get<std::string>().c_str(), result["tokens"].get<unsigned>(),
              result["case"].get<std::string>().c_str());
  for (const char* row : {"compress", "arithmetic", "bare", "echo"}) {
    std::printf("      %-11s %7.0f / %7.0f\n", row, result[row]["p50_micros"].get<double>(),
                result[row]["p99_micros"].get<double>());
  }
  std::printf("      beyond the arithmetic: %.0f / %.0f (bar %.0f)\n",
              result["beyond_arithmetic_p50_micros"].get<double>(),
              result["beyond_arithmetic_p99_micros"].get<double>(), kPlanBarMicros);
}

// The rows whose copies count, once each, by programs that count.
void CountCopies(const Flags& flags, nlohmann::json* report) {
  const TransportOptions& transports = flags.transports;
  const auto once = [](int number) { return std::to_string(std::min(number, 1)); };
  AddCountedCopies({flags.count_program,
                    "--json",
                    "--repeats",
                    "0",
                    "--prompts",
                    "0",
                    "--count-program",
                    "",
                    "--server",
                    flags.count_server,
                    "--backend",
                    flags.backend,
                    "--gib",
                    std::to_string(flags.gib),
                    "--chunk-mib",
                    std::to_string(flags.chunk_mib),
                    "--holds",
                    once(flags.holds),
                    "--transports",
                    once(transports.prompts),
                    "--transport-tokens",
                    std::to_string(transports.tokens),
                    "--transport-geometry",
                    transports.geometry,
                    "--gpu",
                    std::to_string(transports.gpu.gpu),
                    "--nccl-gpu",
                    std::to_string(transports.gpu.nccl_gpu),
                    "--cuda-library",
                    transports.gpu.cuda_library,
                    "--nccl-library",
                    transports.gpu.nccl_library},
                   report);
}

int Measure(const char* self, const Flags& flags) {
  const Servers servers(self, flags.server, flags.backend);
  nlohmann::json report;
  bool passed = true;
  if (flags.repeats > 0) {
    for (const auto& [name, bare, compress] :
         {std::tuple("tcp", servers.bare_tcp(), servers.tcp()),
          std::tuple("unix", servers.bare_unix(), servers.unix_socket())}) {
      const nlohmann::json result = MeasureStreams(flags, name, bare, compress);
      passed = passed && result["median_ratio_of_pairs"].get<double>() >= kThroughputBar;
      if (!flags.json) PrintStreams(result);
      report["streams"].push_back(result);
    }
  }
  if (flags.holds > 0) {
    for (const auto& [name, bare, held] :
         {std::tuple("tcp", servers.bare_tcp(), servers.tcp()),
          std::tuple("unix", servers.bare_unix(), servers.unix_socket())}) {
      nlohmann::json result = MeasureHold({bare, held, servers.pid()}, flags.stream, flags.holds);
      passed = passed && HoldPasses(result, kThroughputBar);
      result["socket"] = name;
      report["holds"].push_back(result);
    }
  }
  if (flags.stripes > 0) {
    for (const auto& [name, bare, compress] :
         {std::tuple("tcp", servers.bare_tcp(), servers.tcp()),
          std::tuple("unix", servers.bare_unix(), servers.unix_socket())}) {
      const nlohmann::json rows = MeasureStripes(flags, name, bare, compress);
      if (!flags.json) PrintStripes(rows);
      report["stripes"].push_back(rows);
    }
  }
  if (flags.prompts > 0) {
    for (const auto& [name, bare, compress] :
         {std::tuple("tcp", servers.bare_tcp(), servers.tcp()),
          std::tuple("unix", servers.bare_unix(), servers.unix_socket())}) {
      const nlohmann::json result = MeasureLatency(flags, name, bare, compress);
      passed = passed && result["added_p50_micros"].get<double>() <= kLatencyBarMicros;
      if (!flags.json) PrintLatency(result);
      report["round_trips"].push_back(result);
    }
  }
  if (flags.plan_prompts > 0) {
    for (const auto& [name, bare, compress] :
         {std::tuple("tcp", servers.bare_tcp(), servers.tcp()),
          std::tuple("unix", servers.bare_unix(), servers.unix_socket())}) {
      for (const PlanCase& plan : PlanCases()) {
        const nlohmann::json result = MeasurePlanMode(flags, name, plan, bare, compress);
        passed = passed && result["beyond_arithmetic_p50_micros"].get<double>() <= kPlanBarMicros;
        if (!flags.json) PrintPlan(result);
        report["plans"].push_back(result);
      }
    }
  }
  if (flags.transports.prompts > 0) {
    report["transports"] = MeasureTransports({servers.bare_tcp(), servers.bare_unix(),
                                              servers.tcp(), servers.unix_socket(), servers.pid()},
                                             flags.transports);
    passed = passed && TransportsPass(report["transports"]);
  }
  if (!flags.count_program.empty() && (flags.holds > 0 || flags.transports.prompts > 0)) {
    CountCopies(flags, &report);
  }
  if (!flags.json && report.contains("holds")) {
    for (const nlohmann::json& result : report["holds"]) PrintHold(result["socket"], result);
  }
  if (!flags.json && report.contains("transports")) PrintTransports(report["transports"]);
  report["passed"] = passed;
  if (flags.json) std::printf("%s\n", report.dump(2).c_str());
  return flags.check && !passed ? 1 : 0;
}

void AddTransportFlags(CLI::App* app, TransportOptions* options) {
  app->add_option("--transports", options->prompts,
                  "Prompts of keys and values over each transport; 0: none")
      ->capture_default_str();
  app->add_option("--transport-tokens", options->tokens, "Tokens of those")->capture_default_str();
  app->add_option("--transport-geometry", options->geometry, "The model of those")
      ->capture_default_str();
  GpuOptions& gpu = options->gpu;
  app->add_option("--gpu", gpu.gpu, "The GPU of CUDA IPC, and the server's of NCCL")
      ->capture_default_str();
  app->add_option("--nccl-gpu", gpu.nccl_gpu, "This program's GPU of NCCL")->capture_default_str();
  app->add_option("--gpu-server", gpu.server,
                  "The server program of those two, and flags of it, separated by spaces; empty: "
                  "--server with --backend cuda");
  app->add_option("--cuda-library", gpu.cuda_library,
                  "Name or path of CUDA's driver; empty: this program")
      ->capture_default_str();
  app->add_option("--nccl-library", gpu.nccl_library, "Name or path of NCCL")
      ->capture_default_str();
}

int Main(int argc, char** argv) {
  KeepFreedMemory();
  grpc_init();  // once more than gRPC does itself: its last shutdown could hang at exit
  Flags flags;
  CLI::App app("Measures Compress against a bare gRPC byte stream, in one run",
               "structkv_wire_bench");
  app.add_option("--gib", flags.gib, "GiB each way in a stream")->capture_default_str();
  app.add_option("--chunk-mib", flags.chunk_mib, "MiB of data per message")->capture_default_str();
  app.add_option("--repeats", flags.repeats, "Streams of each kind and socket; 0: none")
      ->capture_default_str();
  app.add_option("--holds", flags.holds, "Caches held and fetched, of each socket; 0: none")
      ->capture_default_str();
  app.add_option("--stripes", flags.stripes,
                 "Rounds of streams over 1, 2 and 4 connections at once; 0: none")
      ->capture_default_str();
  app.add_option("--prompts", flags.prompts, "Prompts of 512 round trips; 0: none")
      ->capture_default_str();
  app.add_option("--tokens", flags.tokens, "Saliency values per round trip")->capture_default_str();
  app.add_option("--plan", flags.plan_prompts,
                 "Prompts of 32 layers of 131,072 tokens in plan mode; 0: none")
      ->capture_default_str();
  app.add_option("--plan-piece-kib", flags.plan_piece_kib, "KiB of statistics per message there")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  AddTransportFlags(&app, &flags.transports);
  app.add_option("--channel", flags.channel,
                 "gRPC channel arguments of the bare stream's both ends and of Compress' client, "
                 "NAME=INTEGER,... (grpc.http2.max_frame_size=1048576)");
  app.add_option("--server", flags.server, "The server program")->capture_default_str();
  app.add_option("--backend", flags.backend, "Its backend, and that of prompts in this process")
      ->capture_default_str();
  app.add_option("--count-program", flags.count_program,
                 "This program as one that counts its copies; empty: they are not counted")
      ->capture_default_str();
  app.add_option("--count-server", flags.count_server, "The server as such a one")
      ->capture_default_str();
  app.add_flag("--json", flags.json, "Print JSON");
  app.add_flag("--check", flags.check, "Fail where a bar is missed");
  app.add_option("--serve-bare", flags.serve_bare, "")->group("");
  CLI11_PARSE(app, argc, argv);
  if (!flags.channel.empty()) setenv(kChannelSettings, flags.channel.c_str(), /*overwrite=*/1);
  if (!flags.serve_bare.empty()) return ServeBare(flags.serve_bare);
  flags.transports.backend = flags.backend;
  if (flags.transports.gpu.server.empty()) {
    flags.transports.gpu.server = flags.server + " --backend cuda";
  }
  flags.stream.total_bytes = static_cast<uint64_t>(flags.gib * (1 << 30));
  flags.stream.chunk_bytes = static_cast<uint64_t>(flags.chunk_mib * (1 << 20));
  return Measure(argv[0], flags);
}

}  // namespace
}  // namespace structkv::bench

int main(int argc, char** argv) { return structkv::bench::Main(argc, argv); }
