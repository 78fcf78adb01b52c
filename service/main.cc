// structkv-server: options, start, signals, drain.
#include <malloc.h>
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <climits>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <variant>

#include "absl/strings/str_join.h"
#include "grpc/support/log.h"
#include "service/admin/admin.h"
#include "service/admin/telemetry.h"
#include "service/build_info.h"
#include "service/check_config.h"
#include "service/config.h"
#include "service/live_config.h"
#include "service/rpc/log.h"
#include "service/rpc/version.h"
#include "service/serve_loop.h"
#include "service/server.h"
#include "service/trace/otlp_exporter.h"

namespace structkv {
namespace {

// Keeps freed memory in the process: messages are megabytes long, and fresh pages for each cost
// more than everything else about them.
void TuneMalloc() {
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // glibc's maximum
  mallopt(M_TRIM_THRESHOLD, 512 << 20);
  // One heap for all threads: messages are taken on one thread and freed on another, and every heap
  // keeps its own peak. tests/bench/peak_memory.cc sees 150 MiB more without this.
  mallopt(M_ARENA_MAX, 1);
}

// SIGTERM, SIGINT and SIGHUP wait to be fetched, in this thread and all that it starts. SIGPIPE is
// ignored.
sigset_t BlockSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGHUP);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  // A reader of the log that goes away costs lines of the log, not the server.
  std::signal(SIGPIPE, SIG_IGN);
  return signals;
}

// Connections, and each named region, take a descriptor; a soft limit is for programs that use
// select(), which nothing here does.
void RaiseFileLimit() {
  rlimit files = {};
  if (getrlimit(RLIMIT_NOFILE, &files) != 0) return;
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);  // within the hard limit it may
}

int Refuse(const absl::Status& status) {
  std::fprintf(stderr, "structkv-server: %s\n", std::string(status.message()).c_str());
  return 1;
}

absl::StatusOr<std::unique_ptr<trace::OtlpExporter>> StartExporter(
    const Config& config, const std::shared_ptr<rpc::Log>& log) {
  trace::OtlpOptions options = {.endpoint = config.otlp_endpoint,
                                .authorities = config.otlp_authorities};
  options.resource = {{"service.name", "structkv-server"}, {"service.version", rpc::kVersion}};
  char host[HOST_NAME_MAX + 1] = {};
  if (gethostname(host, sizeof(host) - 1) == 0) options.resource.emplace_back("host.name", host);
  options.warn = [log](const std::string& text) { log->Write("warning", {{"otlp", text}}); };
  return trace::OtlpExporter::Start(std::move(options));
}

int Serve(Config config, const sigset_t& signals,
          const std::function<std::variant<Config, EarlyExit>()>& parse) {
  auto log = std::make_shared<rpc::Log>(config.log_format);
  log->SetSessions(config.log_sessions);
  config.server.log = log;
  config.server.warnings = log;
  // gRPC's own lines about an address would come on top of ours.
  gpr_set_log_verbosity(static_cast<gpr_log_severity>(GPR_LOG_SEVERITY_ERROR + 1));
  const std::string region_socket = config.server.regions.socket.path;
  const std::string nccl_library = config.server.nccl.library;
  std::unique_ptr<trace::OtlpExporter> exporter;
  if (!config.otlp_endpoint.empty()) {
    auto started = StartExporter(config, log);
    if (!started.ok()) return Refuse(started.status());
    exporter = *std::move(started);
  }
  admin::Telemetry telemetry(exporter.get());
  if (!config.admin.address.empty() || exporter != nullptr) config.server.observer = &telemetry;
  const std::string otlp_endpoint = config.otlp_endpoint;
  absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(config.server);
  if (!server.ok()) return Refuse(server.status());
  std::unique_ptr<admin::Admin> admin;
  if (!config.admin.address.empty()) {
    auto started = admin::Admin::Start(config.admin, server->get(), &telemetry, log.get());
    if (!started.ok()) return Refuse(started.status());
    admin = *std::move(started);
  }
  session::SessionManager& sessions = (*server)->sessions();
  const std::string nccl = (*server)->nccl_status().ok() ? nccl_library : "";
  const std::string addresses = absl::StrJoin((*server)->addresses(), ",");
  const std::string admin_address = admin == nullptr ? "" : admin->address();
  const std::string revision = BuildRevision();
  log->Write("ready", {{"listen", addresses},
                       {"admin", admin_address},
                       {"version", rpc::kVersion},
                       {"revision", revision},
                       {"backend", sessions.backend().name()},
                       {"device", sessions.backend().device()},
                       {"backend_reason", (*server)->backend_reason()},
                       {"threads", sessions.threads()},
                       {"memory_budget_bytes", sessions.budget().limit_bytes()},
                       {"region_socket", region_socket},
                       {"nccl", nccl},
                       {"otlp", otlp_endpoint}});

  LiveConfig live(std::move(config), parse, server->get(), log.get());
  const ServeEnd end = ServeUntilEnd(server->get(), signals,
                                     {.drain_limit = [&] { return live.drain_limit(); },
                                      .reload = [&] { live.Reload(); },
                                      .look = [&] { live.Look(); }},
                                     log.get());
  if (end.at_once) {
    log->Flush(absl::Seconds(1));
    std::_Exit(end.exit_code);
  }
  return end.exit_code;
}

int Main(int argc, const char* const* argv, const sigset_t& signals) {
  std::variant<Config, EarlyExit> parsed = ParseConfig(argc, argv);
  if (const auto* early = std::get_if<EarlyExit>(&parsed)) {
    std::fputs(early->text.c_str(), early->exit_code == 0 ? stdout : stderr);
    return early->exit_code;
  }
  auto& config = std::get<Config>(parsed);
  if (config.check_only) {
    const absl::StatusOr<std::string> checked = CheckConfig(config);
    if (!checked.ok()) return Refuse(checked.status());
    std::fputs(checked->c_str(), stdout);
    return 0;
  }
  return Serve(std::move(config), signals, [=] { return ParseConfig(argc, argv); });
}

}  // namespace
}  // namespace structkv

int main(int argc, char** argv) {
  structkv::TuneMalloc();
  structkv::RaiseFileLimit();
  // Before any other thread is there, gRPC's too: a signal would end the process by way of one that
  // does not block it.
  const sigset_t signals = structkv::BlockSignals();
  return structkv::Main(argc, argv, signals);
}
