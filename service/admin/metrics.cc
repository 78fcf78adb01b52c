#include "service/admin/metrics.h"

#include <chrono>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/time/clock.h"
#include "prometheus/text_serializer.h"
#include "service/engine/nonfinite.h"
#include "service/session/limit.h"
#include "service/transport/transport.h"

namespace structkv::admin {
namespace {

using Buckets = prometheus::Histogram::BucketBoundaries;

// Seconds: of a layer, from the smallest prompt on a GPU to a million tokens on a CPU.
const Buckets& LayerBuckets() {
  static const auto& buckets = *new Buckets{5e-5,  1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01,
                                            0.025, 0.05, 0.1,    0.25, 0.5,  1,      2.5};
  return buckets;
}

// Seconds: of a stage of a layer, of which the least takes microseconds.
const Buckets& StageBuckets() {
  static const auto& buckets =
      *new Buckets{1e-6, 5e-6, 2.5e-5, 1e-4, 5e-4, 2.5e-3, 0.01, 0.05, 0.25, 1};
  return buckets;
}

// Seconds: of a prompt, as long as its prefill.
const Buckets& PromptBuckets() {
  static const auto& buckets =
      *new Buckets{0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800};
  return buckets;
}

const Buckets& ShareBuckets() {
  static const auto& buckets =
      *new Buckets{0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1};
  return buckets;
}

// "resource_exhausted".
std::string CodeLabel(absl::StatusCode code) {
  return absl::AsciiStrToLower(absl::StatusCodeToString(code));
}
std::string CodeLabel(const absl::Status& status) { return CodeLabel(status.code()); }

std::string Text(std::string_view view) { return std::string(view); }

// Brings a counter to what was counted elsewhere.
void RaiseTo(prometheus::Counter& counter, int64_t value) {
  counter.Increment(static_cast<double>(value) - counter.Value());
}

}  // namespace

Metrics::Counters& Metrics::NewCounters(const char* name, const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry_);
}
Metrics::Gauges& Metrics::NewGauges(const char* name, const char* help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry_);
}
Metrics::Histograms& Metrics::NewHistograms(const char* name, const char* help) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry_);
}

Metrics::Metrics()
    : prompts_(NewCounters("structkv_sessions_total", "Prompts that are over, by status.")),
      refused_(NewCounters("structkv_rejected_total",
                           "Prompts that were refused at open, by the limit, or else by status.")),
      layers_(NewCounters("structkv_layers_total",
                          "Layers that were computed, and those that failed, by status.")),
      input_bytes_(NewCounters("structkv_input_bytes_total",
                               "Bytes of tensors that prompts brought, by transport.")),
      output_bytes_(NewCounters("structkv_output_bytes_total",
                                "Bytes of tensors that prompts and fetches took, by transport.")),
      fallbacks_(NewCounters("structkv_transport_fallback_total",
                             "Prompts that did not get the transport they asked for first.")),
      fetches_(NewCounters("structkv_fetches_total", "Fetches that are over, by status.")),
      nonfinite_(NewCounters("structkv_nonfinite_values_total",
                             "Layers that a NaN or an infinity in what came for them failed.")),
      cuda_errors_(NewCounters("structkv_cuda_errors_total",
                               "Calls of the CUDA runtime that failed, by the error's name.")),
      nccl_aborts_(NewCounters("structkv_nccl_aborts_total", "Communicators that were aborted.")),
      spans_(NewCounters("structkv_trace_spans_total",
                         "Spans that were exported, dropped (too many waited), and failed.")),
      expired_(NewCounters("structkv_leases_expired_total",
                           "Leases that ran out, of held caches and of regions.")),
      log_dropped_(NewCounters("structkv_log_dropped_total", "Log lines that were not written.")),
      connections_refused_(NewCounters("structkv_connections_refused_total",
                                       "Connections beyond those allowed, which were closed.")),
      connections_broken_(
          NewCounters("structkv_connections_broken_total",
                      "Connections that were broken for more streams than one may have.")),
      streams_refused_(NewCounters("structkv_streams_refused_total",
                                   "Streams beyond those that a peer may have, by its kind.")),
      calls_refused_(NewCounters("structkv_calls_refused_total",
                                 "Calls of callers that are not known, or not allowed here.")),
      layer_seconds_(NewHistograms("structkv_layer_compress_duration_seconds",
                                   "Time that a layer was computed.")),
      stage_seconds_(
          NewHistograms("structkv_stage_duration_seconds", "Time that a stage of a layer took.")),
      queue_seconds_(NewHistograms("structkv_queue_wait_seconds",
                                   "Time that a complete layer waited to be computed.")),
      prompt_seconds_(
          NewHistograms("structkv_session_duration_seconds",
                        "Time from a stream's begin to its end, of prompts that were opened.")),
      kept_ratio_(NewHistograms("structkv_compression_ratio",
                                "Rows kept over rows that came, of prompts that ended well.")),
      pivot_ratio_(NewHistograms("structkv_pivot_depth_ratio",
                                 "Pivot layer over layers, of prompts that had a pivot.")),
      active_(NewGauges("structkv_sessions_active", "Prompts that hold memory.")),
      streams_(NewGauges("structkv_streams_active", "Streams that run, fetches among them.")),
      connections_(NewGauges("structkv_connections", "Connections to all TCP addresses.")),
      queued_(NewGauges("structkv_queue_depth", "Complete layers that wait for a thread.")),
      reserved_bytes_(NewGauges("structkv_memory_reserved_bytes", "Memory that is taken.")),
      limit_bytes_(NewGauges("structkv_memory_limit_bytes", "Memory that can be taken.")),
      held_(NewGauges("structkv_held_caches", "Caches held for decode workers.")),
      regions_(NewGauges("structkv_regions", "Memory regions that clients have registered.")),
      mapped_bytes_(NewGauges("structkv_shm_mapped_bytes", "Clients' memory that is mapped.")),
      ipc_handles_(NewGauges("structkv_ipc_handles_open",
                             "Allocations of other processes' GPU memory that are open.")),
      nccl_pairs_(NewGauges("structkv_nccl_pairs", "Clients' GPUs that are attached.")),
      nccl_communicators_(NewGauges("structkv_nccl_communicators", "Communicators that live.")),
      draining_(NewGauges("structkv_draining", "1 from SIGTERM on.")),
      certificate_(NewGauges("structkv_certificate_expiry_timestamp_seconds",
                             "When the server's certificate ends.")),
      build_(NewGauges("structkv_build_info", "What runs; always 1.")),
      started_(NewGauges("structkv_start_timestamp_seconds", "When the server started.")) {
  started_.Add({}).Set(absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch()));
  AddZeros();
}

// A series that begins with its first event hides that one from rate() and increase().
void Metrics::AddZeros() {
  nonfinite_.Add({});
  prompt_seconds_.Add({}, PromptBuckets());
  for (int code = 0; code <= static_cast<int>(absl::StatusCode::kUnauthenticated); ++code) {
    const std::string label = CodeLabel(static_cast<absl::StatusCode>(code));
    prompts_.Add({{"result", label}});
    fetches_.Add({{"result", label}});
    if (code != 0) refused_.Add({{"reason", label}});
  }
  for (const absl::string_view limit : session::kLimits) {
    refused_.Add({{"reason", std::string(limit)}});
  }
  for (const transport::Kind from : transport::kKinds) {
    const std::string name = Text(transport::KindName(from));
    input_bytes_.Add({{"transport", name}});
    output_bytes_.Add({{"transport", name}});
    for (const transport::Kind to : transport::kKinds) {
      if (to != from) fallbacks_.Add({{"from", name}, {"to", Text(transport::KindName(to))}});
    }
  }
}

void Metrics::CountLayer(std::string_view method, const session::LayerTiming& timing) {
  layers_.Add({{"method", Text(method)}, {"result", CodeLabel(timing.status)}}).Increment();
  if (engine::IsNonFinite(timing.status)) nonfinite_.Add({}).Increment();
  layer_seconds_.Add({{"method", Text(method)}}, LayerBuckets())
      .Observe(absl::ToDoubleSeconds(timing.computed));
  for (const engine::Stage stage : engine::kStages) {
    const std::chrono::duration<double> took = timing.stages.Of(stage);
    if (took.count() <= 0) continue;
    OfStage(stage).Observe(took.count());
  }
  queue_seconds_.Add({}, LayerBuckets()).Observe(absl::ToDoubleSeconds(timing.queued));
}

prometheus::Histogram& Metrics::OfStage(engine::Stage stage) {
  std::atomic<prometheus::Histogram*>& known = stages_[static_cast<size_t>(stage)];
  prometheus::Histogram* found = known.load(std::memory_order_acquire);
  if (found == nullptr) {  // of two threads both find the same one
    found = &stage_seconds_.Add({{"stage", Text(engine::StageName(stage))}}, StageBuckets());
    known.store(found, std::memory_order_release);
  }
  return *found;
}

void Metrics::CountPrompt(const rpc::PromptReport& prompt, const absl::Status& status) {
  prompts_.Add({{"result", CodeLabel(status)}}).Increment();
  if (prompt.id.empty()) {
    refused_.Add({{"reason", prompt.refused_by.empty() ? CodeLabel(status) : prompt.refused_by}})
        .Increment();
    return;
  }
  prompt_seconds_.Add({}, PromptBuckets()).Observe(static_cast<double>(prompt.micros) / 1e6);
  const Labels transport = {{"transport", Text(prompt.transport)}};
  input_bytes_.Add(transport).Increment(static_cast<double>(prompt.input_bytes));
  output_bytes_.Add(transport).Increment(static_cast<double>(prompt.output_bytes));
  if (prompt.wished_transport != "-" && prompt.wished_transport != prompt.transport) {
    fallbacks_.Add({{"from", Text(prompt.wished_transport)}, {"to", Text(prompt.transport)}})
        .Increment();
  }
  if (!status.ok() || prompt.picture == nullptr) return;
  const rpc::PromptPicture::View view = prompt.picture->view();
  kept_ratio_.Add({}, ShareBuckets()).Observe(view.kept_share);
  if (!view.pivot.has_value()) return;
  pivot_ratio_.Add({}, ShareBuckets())
      .Observe(static_cast<double>(view.pivot->layer) / static_cast<double>(prompt.layers));
}

void Metrics::CountFetch(const rpc::FetchReport& fetch, const absl::Status& status) {
  fetches_.Add({{"result", CodeLabel(status)}}).Increment();
  if (fetch.output_bytes == 0) return;  // it may have been refused before there was a transport
  output_bytes_.Add({{"transport", Text(fetch.transport)}})
      .Increment(static_cast<double>(fetch.output_bytes));
}

std::string Metrics::Render(const Readings& readings) {
  const std::lock_guard lock(render_mutex_);
  build_
      .Add({{"version", readings.version},
            {"revision", readings.revision},
            {"backend", readings.backend}})
      .Set(1);
  for (const auto& [name, pool] : readings.pools) {
    reserved_bytes_.Add({{"pool", name}}).Set(static_cast<double>(pool.reserved_bytes));
    limit_bytes_.Add({{"pool", name}}).Set(static_cast<double>(pool.limit_bytes));
  }
  for (const auto& [gauges, value] :
       {std::pair(&active_, readings.active_prompts), std::pair(&streams_, readings.active_streams),
        std::pair(&connections_, readings.connections), std::pair(&queued_, readings.queued_layers),
        std::pair(&held_, readings.held_caches), std::pair(&regions_, readings.regions),
        std::pair(&mapped_bytes_, readings.mapped_bytes),
        std::pair(&ipc_handles_, readings.ipc_handles),
        std::pair(&nccl_pairs_, readings.nccl_pairs),
        std::pair(&nccl_communicators_, readings.nccl_communicators),
        std::pair(&draining_, int64_t{readings.draining})}) {
    gauges->Add({}).Set(static_cast<double>(value));
  }
  if (readings.certificate_end != absl::InfiniteFuture()) {
    certificate_.Add({}).Set(static_cast<double>(absl::ToUnixSeconds(readings.certificate_end)));
  }
  RaiseTo(connections_refused_.Add({}), readings.connections_refused);
  RaiseTo(connections_broken_.Add({}), readings.connections_broken);
  RaiseTo(streams_refused_.Add({{"reason", "connection"}}), readings.streams_refused.connection);
  RaiseTo(streams_refused_.Add({{"reason", "unix_sockets"}}),
          readings.streams_refused.unix_sockets);
  RaiseTo(calls_refused_.Add({{"reason", "unauthenticated"}}),
          readings.calls_refused.unauthenticated);
  RaiseTo(calls_refused_.Add({{"reason", "permission_denied"}}),
          readings.calls_refused.permission_denied);
  RaiseTo(log_dropped_.Add({}), readings.log_lines_dropped);
  RaiseTo(nccl_aborts_.Add({}), readings.nccl_aborts);
  for (const auto& [name, count] : readings.cuda_errors) {
    RaiseTo(cuda_errors_.Add({{"kind", name}}), count);
  }
  if (readings.spans.has_value()) {
    RaiseTo(spans_.Add({{"result", "exported"}}), readings.spans->exported);
    RaiseTo(spans_.Add({{"result", "dropped"}}), readings.spans->dropped);
    RaiseTo(spans_.Add({{"result", "failed"}}), readings.spans->failed);
  }
  RaiseTo(expired_.Add({{"kind", "held_cache"}}), readings.held_caches_expired);
  RaiseTo(expired_.Add({{"kind", "region"}}), readings.regions_expired);
  return prometheus::TextSerializer().Serialize(registry_.Collect());
}

}  // namespace structkv::admin
