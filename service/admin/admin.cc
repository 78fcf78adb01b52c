#include "service/admin/admin.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "service/admin/status_json.h"
#include "service/admin/status_page.h"
#include "service/build_info.h"
#include "service/rpc/version.h"

namespace structkv::admin {
namespace {

constexpr char kMetricsType[] = "text/plain; version=0.0.4; charset=utf-8";
constexpr char kIndex[] = "/livez\n/metrics\n/readyz\n/statusz\n/statusz.json\n";

Readings::Pool PoolOf(const session::MemoryBudget& budget) {
  return {budget.reserved_bytes(), budget.limit_bytes()};
}

void AddBackend(const BackendStats& stats, Readings* readings) {
  for (const BackendStats::Gpu& gpu : stats.gpus) {
    const std::string name = absl::StrCat("gpu", gpu.index);
    readings->pools[name] = {gpu.calls.used_bytes, gpu.calls.bytes};
    readings->pools[absl::StrCat(name, "_resident")] = {gpu.resident.used_bytes,
                                                        gpu.resident.bytes};
    if (gpu.apart.bytes == 0) continue;
    readings->pools[absl::StrCat(name, "_nccl")] = {gpu.apart.used_bytes, gpu.apart.bytes};
  }
  readings->ipc_handles = stats.open_imports;
  readings->cuda_errors = stats.errors;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Admin>> Admin::Start(const HttpOptions& options,
                                                    const Server* server, Telemetry* telemetry,
                                                    const rpc::Log* log) {
  std::unique_ptr<Admin> admin(new Admin(server, telemetry, log));
  absl::StatusOr<std::unique_ptr<HttpServer>> http = HttpServer::Start(
      options, [admin = admin.get()](std::string_view path) { return admin->Handle(path); });
  if (!http.ok()) {
    return absl::Status(http.status().code(),
                        absl::StrCat("admin-listen: ", http.status().message()));
  }
  admin->http_ = *std::move(http);
  return admin;
}

HttpResponse Admin::Handle(std::string_view path) const {
  // That it answers is the answer: a server whose backend is lost ends by itself.
  if (path == "/livez") return {.body = "ok\n"};
  if (path == "/readyz") return Ready();
  if (path == "/metrics") {
    return {.content_type = kMetricsType, .body = telemetry_->metrics().Render(Read())};
  }
  if (path == "/statusz") {
    return {.content_type = "text/html; charset=utf-8", .body = std::string(StatusPage())};
  }
  if (path == "/statusz.json") {
    return {.content_type = "application/json",
            .body = StatusJson({.readings = Read(),
                                .device = server_->sessions().backend().device(),
                                .threads = server_->sessions().threads(),
                                .addresses = server_->addresses(),
                                .uptime = absl::Now() - started_,
                                .drain = server_->drain_progress(),
                                .running = server_->Report(),
                                .prompts = telemetry_->recent().prompts(),
                                .errors = telemetry_->recent().errors()})};
  }
  if (path == "/") return {.body = kIndex};
  return {.status = 404, .body = absl::StrCat("there is nothing here; there are\n", kIndex)};
}

HttpResponse Admin::Ready() const {
  const session::SessionManager& sessions = server_->sessions();
  if (absl::Status health = sessions.backend().Health(); !health.ok()) {
    return {.status = 503, .body = absl::StrCat("the backend is lost: ", health.message(), "\n")};
  }
  if (sessions.draining()) return {.status = 503, .body = "draining\n"};
  return {.body = "ok\n"};
}

Readings Admin::Read() const {
  const session::SessionManager& sessions = server_->sessions();
  const session::HeldCaches& held = sessions.held_caches();
  const nccl::HubStats nccl = server_->nccl_stats();
  Readings readings = {.version = rpc::kVersion,
                       .revision = BuildRevision(),
                       .backend = std::string(sessions.backend().name()),
                       .active_prompts = sessions.active_sessions(),
                       .active_streams = server_->active_streams(),
                       .connections = server_->connections(),
                       .queued_layers = sessions.queue_depth(),
                       .held_caches = held.count(),
                       .nccl_pairs = nccl.pairs,
                       .nccl_communicators = nccl.communicators.live,
                       .draining = sessions.draining(),
                       .connections_refused = server_->connections_refused(),
                       .connections_broken = server_->connections_broken(),
                       .streams_refused = server_->streams_refused(),
                       .calls_refused = server_->calls_refused(),
                       .log_lines_dropped = log_->dropped(),
                       .held_caches_expired = held.expired(),
                       .nccl_aborts = nccl.aborts,
                       .spans = telemetry_->spans()};
  AddBackend(sessions.backend().stats(), &readings);
  if (const rpc::TlsOptions& tls = server_->options().tls; tls.enabled()) {
    // Files that cannot be taken now: as a certificate that has ended.
    readings.certificate_end = rpc::CertificateExpiry(tls).value_or(absl::UnixEpoch());
  }
  readings.pools["prompts"] = PoolOf(sessions.budget());
  readings.pools["held_caches"] = PoolOf(held.budget());
  if (const transport::RegionRegistry* regions = server_->regions(); regions != nullptr) {
    readings.regions = regions->regions();
    readings.mapped_bytes = regions->mapped_bytes();
    readings.regions_expired = regions->expired();
    readings.pools["regions"] = {regions->mapped_bytes(), regions->options().max_bytes};
  }
  return readings;
}

}  // namespace structkv::admin
