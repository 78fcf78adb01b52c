// Peak memory of structkv-server while a prompt streams through it, beside what is promised: two
// layers and the compacted results, whatever the number of layers. A fresh server for every number
// of layers; see --help.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "CLI/CLI.hpp"
#include "grpc/grpc.h"
#include "nlohmann/json.hpp"
#include "tests/bench/memory_stream.h"
#include "tests/testing/process.h"

namespace structkv::bench {
namespace {

constexpr double kMiB = 1 << 20;
// Of the highest peak above the lowest. What is reserved grows by 5 % from 4 to 32 layers, for the
// centralities that wait for the pivot.
constexpr double kGrowthBar = 0.10;
// Of what a prompt reserves: what gRPC holds of a message that it still receives is not in it.
constexpr double kReservedBar = 1.05;

struct Flags {
  std::vector<uint32_t> layers = {4, 16, 32};
  uint32_t tokens = 131072;
  std::string server = STRUCTKV_SERVER;
  bool tcp = false;
  bool json = false;
  bool check = false;
};

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "structkv_peak_memory_bench: %s\n", what.c_str());
  std::exit(1);
}

// The largest anonymous memory of a process, looked at every other millisecond. What the kernel
// keeps itself (VmHWM) counts the pages of the program's file too.
class Sampler {
 public:
  explicit Sampler(pid_t pid)
      : thread_([this, pid] {
          while (!stop_.load()) {
            peak_ = std::max(peak_, testkit::StatusBytes(pid, "RssAnon"));
            usleep(2000);
          }
        }) {}
  ~Sampler() { Stop(); }
  int64_t Stop() {
    stop_.store(true);
    if (thread_.joinable()) thread_.join();
    return peak_;
  }

 private:
  std::atomic<bool> stop_{false};
  int64_t peak_ = 0;  // of the thread, until it is joined
  std::thread thread_;
};

nlohmann::ordered_json Measure(const Flags& flags, uint32_t layers) {
  const testkit::TemporaryDirectory directory;
  testkit::Process server({flags.server, "--listen",
                           flags.tcp ? "127.0.0.1:17413" : "unix:" + directory.Path("socket")});
  if (!server.WaitForLine("ready")) Die("structkv-server does not start: " + server.error());
  const int64_t idle = testkit::StatusBytes(server.pid(), "VmRSS");
  Sampler sampler(server.pid());
  const auto prompt =
      StreamPrompt(flags.tcp ? "127.0.0.1:17413" : "unix:" + directory.Path("socket"),
                   LlamaOpen(layers, flags.tokens));
  if (!prompt.ok()) Die(prompt.status().ToString());
  const int64_t anonymous = sampler.Stop();
  const int64_t peak = testkit::StatusBytes(server.pid(), "VmHWM");
  const uint64_t two_layers = 2 * prompt->layer_bytes;
  return {{"layers", layers},
          {"tokens", flags.tokens},
          {"input_bytes", prompt->summary.input_bytes()},
          {"seconds", prompt->seconds},
          {"idle_rss_bytes", idle},
          {"peak_rss_bytes", peak},
          {"peak_anonymous_bytes", anonymous},
          {"reserved_bytes", prompt->opened.reserved_bytes()},
          {"layers_in_flight", prompt->opened.layers_in_flight()},
          {"two_layers_bytes", two_layers},
          {"results_bytes", prompt->results_bytes},
          {"promised_bytes", two_layers + prompt->results_bytes}};
}

void Print(const nlohmann::ordered_json& run) {
  const auto mib = [&run](const char* field) { return run[field].get<double>() / kMiB; };
  std::printf("%6u %9.0f %9.0f %9.0f %9.0f %9.0f %9.0f %8.1f\n", run["layers"].get<uint32_t>(),
              mib("input_bytes"), mib("peak_rss_bytes"), mib("peak_anonymous_bytes"),
              mib("idle_rss_bytes"), mib("reserved_bytes"), mib("promised_bytes"),
              run["seconds"].get<double>());
}

int Run(const Flags& flags) {
  if (!flags.json) {
    std::printf(
        "MiB; promised: two layers and the compacted results\n%6s %9s %9s %9s %9s %9s %9s %8s\n",
        "layers", "prompt", "peak RSS", "anonymous", "idle RSS", "reserved", "promised", "seconds");
  }
  nlohmann::ordered_json report;
  bool within = true;
  std::vector<double> peaks;
  for (const uint32_t layers : flags.layers) {
    const nlohmann::ordered_json run = Measure(flags, layers);
    if (!flags.json) Print(run);
    peaks.push_back(run["peak_rss_bytes"].get<double>());
    const double reserved =
        run["idle_rss_bytes"].get<double>() + run["reserved_bytes"].get<double>() * kReservedBar;
    within = within && peaks.back() <= std::min(run["promised_bytes"].get<double>(), reserved);
    report["runs"].push_back(run);
  }
  const auto [least, most] = std::minmax_element(peaks.begin(), peaks.end());
  const double growth = *most / *least - 1;
  report["growth"] = growth;
  report["growth_bar"] = kGrowthBar;
  report["passed"] = within && growth <= kGrowthBar;
  if (flags.json) {
    std::printf("%s\n", report.dump(2).c_str());
  } else {
    std::printf(
        "highest peak %.1f %% above the lowest (bar %.0f %%); every peak within the promise and "
        "what was reserved: %s\n",
        growth * 100, kGrowthBar * 100, within ? "yes" : "no");
  }
  return flags.check && !report["passed"].get<bool>() ? 1 : 0;
}

int Main(int argc, char** argv) {
  grpc_init();  // once more than gRPC does itself: its last shutdown could hang at exit
  Flags flags;
  CLI::App app(
      "Measures structkv-server's peak memory while Llama-3.1-8B prompts stream through it",
      "structkv_peak_memory_bench");
  app.add_option("--layers", flags.layers, "Numbers of layers, each with a server of its own")
      ->delimiter(',')
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--tokens", flags.tokens, "Prompt length")->capture_default_str();
  app.add_option("--server", flags.server, "The server program")->capture_default_str();
  app.add_flag("--tcp", flags.tcp, "Stream over TCP loopback in place of a unix socket");
  app.add_flag("--json", flags.json, "Print JSON");
  app.add_flag("--check", flags.check, "Fail where the promise is broken; for long prompts");
  CLI11_PARSE(app, argc, argv);
  return Run(flags);
}

}  // namespace
}  // namespace structkv::bench

int main(int argc, char** argv) { return structkv::bench::Main(argc, argv); }
