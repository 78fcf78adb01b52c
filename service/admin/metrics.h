// The server's metrics, in Prometheus' terms. docs/operations.md lists them.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "service/engine/stage_times.h"
#include "service/rpc/identity.h"
#include "service/rpc/peer_streams.h"
#include "service/rpc/stream_observer.h"
#include "service/trace/otlp_exporter.h"

namespace structkv::admin {

// What is read of the server when it is asked for its metrics.
struct Readings {
  std::string version;
  std::string revision;
  std::string backend;
  struct Pool {
    int64_t reserved_bytes = 0;
    int64_t limit_bytes = 0;
  };
  std::map<std::string, Pool> pools;  // by name
  int64_t active_prompts = 0;
  int64_t active_streams = 0;
  int64_t connections = 0;
  int64_t queued_layers = 0;
  int64_t held_caches = 0;
  int64_t regions = 0;
  int64_t mapped_bytes = 0;
  int64_t nccl_pairs = 0;
  int64_t nccl_communicators = 0;
  bool draining = false;
  absl::Time certificate_end = absl::InfiniteFuture();  // infinite: there is none
  int64_t ipc_handles = 0;
  // Since the start; never fall.
  int64_t connections_refused = 0;
  int64_t connections_broken = 0;
  rpc::RefusedStreams streams_refused;
  rpc::RefusedCalls calls_refused;
  int64_t log_lines_dropped = 0;
  int64_t held_caches_expired = 0;
  int64_t regions_expired = 0;
  int64_t nccl_aborts = 0;
  std::map<std::string, int64_t> cuda_errors;  // by name
  std::optional<trace::ExportCounts> spans;    // none: nothing is recorded
};

// Thread-safe. No series is ever of one prompt or one client: their number is bounded by the
// methods, transports and status codes that there are.
class Metrics {
 public:
  Metrics();

  void CountLayer(std::string_view method, const session::LayerTiming& timing);
  void CountPrompt(const rpc::PromptReport& prompt, const absl::Status& status);
  void CountFetch(const rpc::FetchReport& fetch, const absl::Status& status);

  // Prometheus' text format.
  std::string Render(const Readings& readings);

 private:
  using Labels = std::map<std::string, std::string>;
  using Counters = prometheus::Family<prometheus::Counter>;
  using Gauges = prometheus::Family<prometheus::Gauge>;
  using Histograms = prometheus::Family<prometheus::Histogram>;

  void AddZeros();
  Counters& NewCounters(const char* name, const char* help);
  Gauges& NewGauges(const char* name, const char* help);
  prometheus::Histogram& OfStage(engine::Stage stage);
  Histograms& NewHistograms(const char* name, const char* help);

  prometheus::Registry registry_;
  Counters& prompts_;
  Counters& refused_;
  Counters& layers_;
  Counters& input_bytes_;
  Counters& output_bytes_;
  Counters& fallbacks_;
  Counters& fetches_;
  Counters& nonfinite_;
  Counters& cuda_errors_;
  Counters& nccl_aborts_;
  Counters& spans_;
  Counters& expired_;
  Counters& log_dropped_;
  Counters& connections_refused_;
  Counters& connections_broken_;
  Counters& streams_refused_;
  Counters& calls_refused_;
  Histograms& layer_seconds_;
  Histograms& stage_seconds_;
  Histograms& queue_seconds_;
  Histograms& prompt_seconds_;
  Histograms& kept_ratio_;
  Histograms& pivot_ratio_;
  Gauges& active_;
  Gauges& streams_;
  Gauges& connections_;
  Gauges& queued_;
  Gauges& reserved_bytes_;
  Gauges& limit_bytes_;
  Gauges& held_;
  Gauges& regions_;
  Gauges& mapped_bytes_;
  Gauges& ipc_handles_;
  Gauges& nccl_pairs_;
  Gauges& nccl_communicators_;
  Gauges& draining_;
  Gauges& certificate_;
  Gauges& build_;
  Gauges& started_;
  // Those of stages that a layer had, so that none is looked up by its label for each layer.
  std::array<std::atomic<prometheus::Histogram*>, engine::kStages.size()> stages_ = {};
  std::mutex render_mutex_;  // one reading at a time
};

}  // namespace structkv::admin
